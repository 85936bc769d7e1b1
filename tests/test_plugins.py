"""Loading plugins: what fits is let in, what does not is named, and nobody sinks anybody else."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from types import ModuleType, SimpleNamespace

import pytest

from makeready.attention_backends.reference import ReferenceBackend
from makeready.cache.block_size import MultipleOf
from makeready.device import DeviceFacts
from makeready.errors import PluginError
from makeready.platforms.cpu import CPU as CPU_PLATFORM
from makeready.platforms.interface import Platform
from makeready.platforms.provider import PlatformProvider, PluginProblem, ProbeResult
from makeready.plugins.hookspecs import hookimpl
from makeready.plugins.manager import load_plugins
from makeready.plugins.records import KVConnectorProvider

CPU = DeviceFacts(platform="cpu", device_type="cpu")


class WilfulPlatform(Platform):
    def update_block_size_for_backend(self, request):
        return 64


ACME = Platform(name="acme", device_type="cpu")


class OtherBackend(ReferenceBackend):
    name = "acme_attention"


def provider(platform=None) -> PlatformProvider:
    platform = platform or ACME
    device = DeviceFacts(platform=platform.name, device_type="cpu", name="Acme One")
    probe = ProbeResult(available=True, reason="1 device: Acme One", devices=(device,))
    return PlatformProvider(
        name=platform.name, platform=platform, probe=lambda: probe, distribution="makeready-acme"
    )


def plugin(**hooks) -> ModuleType:
    """A plugin module whose hooks are ``hooks``, marked as a vendor marks them."""
    return unmarked(**{name: hookimpl(function) for name, function in hooks.items()})


def unmarked(**attributes) -> ModuleType:
    module = ModuleType("acme")
    vars(module).update(attributes)
    return module


def load(*extra, **options):
    return load_plugins(entry_points=(), extra=extra, **options)


def only_problem(plugins) -> PluginProblem:
    assert len(plugins.problems) == 1, plugins.problems
    return plugins.problems[0]


def names(plugins) -> list[str]:
    return [info.name for info in plugins.infos]


def test_what_comes_with_the_package_enters_through_hooks():
    plugins = load()
    assert [given.name for given in plugins.providers] == ["cpu"]
    assert plugins.problems == ()
    backends = [backend.name for backend in plugins.attention_backends(CPU).backends]
    assert {"flash", "flex", "reference"} <= set(backends)
    assert all(info.builtin and info.hooks for info in plugins.infos)


def test_every_call_builds_its_own():
    assert "acme" in names(load(("acme", plugin(makeready_platforms=lambda: [provider()]))))
    assert "acme" not in names(load())


def test_a_vendor_s_plugin_brings_platform_backend_and_connector():
    connector = KVConnectorProvider(name="acme_link", summary="Acme's wire", build=lambda cache, options: object())
    plugins = load(
        (
            "acme",
            plugin(
                makeready_platforms=lambda: [provider()],
                makeready_attention_backends=lambda device: [OtherBackend()] if device.platform == "acme" else [],
                makeready_kv_connectors=lambda: [connector],
            ),
        )
    )
    assert [given.name for given in plugins.providers] == ["cpu", "acme"]
    assert plugins.connectors == (connector,)
    offers = plugins.attention_backends(DeviceFacts(platform="acme", device_type="cpu"))
    assert [(o.backend.name, o.plugin) for o in offers.offered if o.plugin == "acme"] == [("acme_attention", "acme")]
    assert "acme_attention" not in [backend.name for backend in plugins.attention_backends(CPU).backends]


def test_plugins_that_break_at_import_are_named_and_the_others_load():
    good = plugin(makeready_kv_connectors=lambda: [])
    plugins = load_plugins(
        entry_points=[
            EntryPoint("gone", "a_module_that_is_not_there", "makeready"),
            EntryPoint("noattr", "json:nothing_here", "makeready"),
        ],
        extra=[("good", good)],
    )
    assert "good" in names(plugins)
    assert [(p.name, p.stage) for p in plugins.problems] == [("gone", "import"), ("noattr", "import")]
    assert plugins.problems[0].exception == "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"
    assert "plugin 'gone'" in plugins.problems[0].sentence()


@pytest.mark.parametrize(
    ("broken", "stage", "text"),
    [
        (plugin(makeready_plattforms=lambda: []), "register", "makeready_plattforms"),
        (plugin(makeready_platforms=lambda device: []), "register", "device"),
        (unmarked(makeready_platforms=lambda: []), "register", "not marked with @makeready"),
        (unmarked(), "register", "implements none of the hooks"),
        (SimpleNamespace(), "register", "unhashable"),
        (OtherBackend, "register", "names the class OtherBackend"),
        (plugin(makeready_platforms=lambda: 1 / 0), "call", "makeready_platforms: ZeroDivisionError"),
        (plugin(makeready_platforms=lambda: None), "result", "returned NoneType, expected a sequence"),
        (plugin(makeready_platforms=lambda: "acme"), "result", "returned str, expected a sequence"),
        (plugin(makeready_platforms=lambda: [ACME]), "result", "with Platform, expected PlatformProvider"),
        (plugin(makeready_platforms=lambda: [provider(), provider()]), "result", "names acme more than once"),
        (plugin(makeready_kv_connectors=lambda: [3]), "result", "with int, expected KVConnectorProvider"),
    ],
)
def test_plugins_that_do_not_fit_are_named_with_what_is_wrong(broken, stage, text):
    plugins = load(("acme", broken))
    problem = only_problem(plugins)
    assert (problem.name, problem.stage) == ("acme", stage)
    assert text in problem.exception
    assert "acme" not in names(plugins)
    assert [given.name for given in plugins.providers] == ["cpu"]


def test_a_hook_wrapper_is_refused():
    def around():
        yield

    plugins = load(("acme", unmarked(makeready_platforms=hookimpl(wrapper=True)(around))))
    assert "hook wrapper" in only_problem(plugins).exception


def test_a_policy_of_the_wrong_type_or_name_is_refused():
    wrong_type = PlatformProvider(name="acme", platform=object(), probe=lambda: None, distribution="d")
    wrong_name = PlatformProvider(name="amce", platform=ACME, probe=lambda: None, distribution="d")
    assert "is object, expected an instance of" in only_problem(
        load(("acme", plugin(makeready_platforms=lambda: [wrong_type])))
    ).exception
    assert "the two names must be equal" in only_problem(
        load(("acme", plugin(makeready_platforms=lambda: [wrong_name])))
    ).exception


def test_a_platform_that_overrides_the_two_phases_is_refused():
    wilful = WilfulPlatform(name="acme", device_type="cpu")
    problem = only_problem(load(("acme", plugin(makeready_platforms=lambda: [provider(wilful)]))))
    assert "WilfulPlatform overrides update_block_size_for_backend; declare constraints" in problem.exception


def test_one_name_from_two_wheels_is_given_to_neither_and_both_are_named():
    plugins = load(
        ("first", plugin(makeready_platforms=lambda: [provider()])),
        ("second", plugin(makeready_platforms=lambda: [provider()])),
    )
    assert [given.name for given in plugins.providers] == ["cpu"]
    assert {problem.name for problem in plugins.problems} == {"first", "second"}
    assert "the platform 'acme' is also brought by plugin 'second'" in plugins.problems[0].exception


def test_the_package_s_own_platform_cannot_be_taken_over():
    plugins = load(("thief", plugin(makeready_platforms=lambda: [provider(CPU_PLATFORM)])))
    assert [given.distribution for given in plugins.providers] == ["makeready"]
    assert "the platform 'cpu' is also brought by plugin 'cpu' (makeready" in only_problem(plugins).exception


def test_two_wheels_with_one_entry_point_name_are_both_refused():
    plugins = load(*(("acme", plugin(makeready_kv_connectors=lambda: [])) for _ in range(2)))
    assert "acme" not in names(plugins)
    assert [problem.name for problem in plugins.problems] == ["acme", "acme"]


def test_a_backend_name_that_is_taken_is_a_problem_of_the_offers():
    plugins = load(("thief", plugin(makeready_attention_backends=lambda device: [ReferenceBackend()])))
    offers = plugins.attention_backends(CPU)
    assert [o.plugin for o in offers.offered if o.backend.name == "reference"] == ["reference"]
    assert "attention backend 'reference'" in offers.problems[0].exception


def test_a_backend_hook_that_raises_does_not_take_the_others_along():
    plugins = load(("acme", plugin(makeready_attention_backends=lambda device: device.nothing)))
    offers = plugins.attention_backends(CPU)
    assert "reference" in [backend.name for backend in offers.backends]
    assert offers.problems[0].exception.startswith("makeready_attention_backends: AttributeError")


def test_block_size_constraints_are_collected_and_a_failure_is_an_error():
    chunks = MultipleOf(64, owner="acme_link")
    plugins = load(("acme", plugin(makeready_block_size_constraints=lambda request: [chunks])))
    assert [constraint.owner for constraint in plugins.block_size_constraints(None)] == ["acme_link"]
    failures = ((lambda request: [64], "with int, expected MultipleOf or"), (lambda: 1 / 0, "ZeroDivisionError"))
    for broken, text in failures:
        plugins = load(("acme", plugin(makeready_block_size_constraints=broken)))
        with pytest.raises(PluginError, match=f"plugin 'acme' .*{text}"):
            plugins.block_size_constraints(None)


def test_engine_startup_hears_of_it_once_and_may_say_a_sentence_or_nothing():
    heard = []
    plugins = load(
        ("talks", plugin(makeready_engine_startup=lambda ready: "tuned for Acme One")),
        ("silent", plugin(makeready_engine_startup=lambda ready: heard.append(ready))),
    )
    notes = plugins.engine_startup("ready")
    assert [(note.plugin, note.text) for note in notes] == [("talks", "tuned for Acme One")]
    assert heard == ["ready"]
    plugins = load(("acme", plugin(makeready_engine_startup=lambda: 1 / 0)))
    with pytest.raises(PluginError, match="makeready_engine_startup: ZeroDivisionError"):
        plugins.engine_startup("ready")


def test_plugins_can_be_left_out_by_name_or_all(monkeypatch):
    points = [EntryPoint("gone", "not_there", "makeready"), EntryPoint("lost", "not_there", "makeready")]
    assert load_plugins(entry_points=points, disabled="gone, other").disabled == ("gone",)
    everything_out = load_plugins(entry_points=points, disabled="all")
    assert everything_out.problems == ()
    assert everything_out.disabled == ("gone", "lost")
    monkeypatch.setenv("MAKEREADY_DISABLE_PLUGINS", "lost")
    plugins = load_plugins(entry_points=points)
    assert (plugins.disabled, [problem.name for problem in plugins.problems]) == (("lost",), ["gone"])


def test_one_object_under_two_names_is_refused():
    same = plugin(makeready_kv_connectors=lambda: [])
    plugins = load(("acme", same), ("other", same))
    assert "acme" in names(plugins)
    assert only_problem(plugins).name == "other"
