"""Which platform runs: never silently another one."""

from __future__ import annotations

import pytest

from makeready.device import DeviceFacts
from makeready.errors import PlatformError, PluginError
from makeready.platforms.interface import Platform
from makeready.platforms.provider import PlatformProvider, PluginProblem, ProbeResult
from makeready.platforms.selection import select_platform


def provider(name: str, *, devices: int = 1, probe=None, capability=None, least=None) -> PlatformProvider:
    """A platform with ``devices`` devices, or whose probe says that there is none."""
    found = tuple(
        DeviceFacts(platform=name, device_type=name, index=i, name=f"{name} {i}", compute_capability=capability)
        for i in range(devices)
    )
    result = ProbeResult(
        available=devices > 0,
        reason=f"{devices} devices" if devices else f"no {name} device: the driver is not loaded",
        devices=found,
    )
    return PlatformProvider(
        name=name,
        platform=Platform(name=name, device_type=name, min_compute_capability=least),
        probe=probe or (lambda: result),
        distribution=f"makeready-{name}",
    )


def broken(name: str, **more) -> PluginProblem:
    return PluginProblem(
        **{
            "name": name,
            "distribution": f"{name}-wheel",
            "version": "2.1",
            "stage": "import",
            "exception": "ImportError: libacme.so: cannot open shared object file",
            **more,
        }
    )


def raises() -> ProbeResult:
    raise OSError("libacme.so is gone")


def test_auto_takes_the_first_accelerator_whose_probe_succeeds():
    everyone = [provider("cpu"), provider("acme"), provider("cuda"), provider("xpu", devices=0)]
    selection = select_platform(everyone, None)
    assert selection.provider.name == "cuda"
    assert [(c.name, c.chosen) for c in selection.candidates] == [
        ("xpu", False), ("cuda", True), ("acme", False), ("cpu", False),
    ]  # fmt: skip
    reasons = {candidate.name: candidate.reason for candidate in selection.candidates}
    assert reasons["xpu"] == "no xpu device: the driver is not loaded"
    assert "cuda comes first" in reasons["acme"]
    assert "--platform cpu" in reasons["cpu"]


def test_auto_falls_to_cpu_only_when_no_accelerator_is_usable():
    selection = select_platform([provider("cpu"), provider("cuda", devices=0)], None)
    assert selection.provider.name == "cpu"
    assert selection.device.name == "cpu 0"


def test_auto_beside_a_broken_plugin_is_an_error_that_says_how_to_go_on():
    with pytest.raises(PluginError, match="libacme.so") as caught:
        select_platform([provider("cpu"), provider("cuda")], None, [broken("acme")])
    message = caught.value.message
    assert "plugin 'acme' (acme-wheel 2.1) cannot be imported" in message
    assert "--platform cuda or --platform cpu" in message
    assert "MAKEREADY_DISABLE_PLUGINS=acme" in message


def test_a_platform_asked_for_runs_beside_a_broken_plugin_which_is_kept():
    selection = select_platform([provider("cpu"), provider("cuda", probe=raises)], "cpu", [broken("acme")])
    assert selection.provider.name == "cpu"
    assert selection.problems == (broken("acme"),)
    assert {c.name: c.probe is None for c in selection.candidates} == {"cpu": False, "cuda": True}
    assert selection.to_dict()["problems"][0]["name"] == "acme"


@pytest.mark.parametrize(
    "problem",
    [
        broken("acme"),
        broken("acme_npu", claims=("acme",)),
        broken("Acme"),
    ],
)
def test_asking_for_what_only_a_broken_plugin_provides_names_it(problem):
    with pytest.raises(PluginError, match="platform 'acme' was asked for, but plugin .* cannot be imported"):
        select_platform([provider("cpu")], "acme", [problem])


def test_asking_for_cuda_without_its_wheel_says_what_to_install():
    with pytest.raises(PlatformError, match="pip install ./plugins/wheels/makeready-cuda"):
        select_platform([provider("cpu")], "cuda")


def test_asking_for_an_unknown_platform_names_those_there_are():
    with pytest.raises(PlatformError, match="'tpu' is not known; installed are cuda, cpu") as caught:
        select_platform([provider("cpu"), provider("cuda")], "tpu")
    assert caught.value.expected == ["cuda", "cpu"]


def test_asking_for_an_unknown_platform_beside_a_broken_plugin_names_that_too():
    with pytest.raises(PlatformError, match="'tpu' is not known.*plugin 'acme'"):
        select_platform([provider("cpu")], "tpu", [broken("acme")])


def test_asking_for_a_platform_that_was_left_out_says_so():
    with pytest.raises(PlatformError, match="MAKEREADY_DISABLE_PLUGINS leaves its plugin out"):
        select_platform([provider("cpu")], "cuda", disabled=["cuda"])


def test_a_platform_asked_for_without_its_device_is_refused_not_replaced():
    with pytest.raises(PlatformError, match="'cuda' was asked for but its probe refused it: no cuda device"):
        select_platform([provider("cpu"), provider("cuda", devices=0)], "cuda")


def test_a_device_that_is_not_there_is_refused_with_both_numbers():
    assert select_platform([provider("cuda", devices=2)], "cuda", device_index=1).device.name == "cuda 1"
    with pytest.raises(PlatformError, match="device_index 2 is not there.*2 devices, index 0, 1"):
        select_platform([provider("cuda", devices=2)], None, device_index=2)


@pytest.mark.parametrize(
    ("probe", "text"),
    [
        (raises, "raised OSError: libacme.so is gone"),
        (lambda: True, "returned bool, expected ProbeResult"),
        (lambda: ProbeResult(available=True, reason="yes"), "names no device"),
    ],
)
def test_a_probe_that_breaks_its_contract_is_an_error_not_a_no(probe, text):
    with pytest.raises(PluginError, match=text):
        select_platform([provider("acme", probe=probe), provider("cpu")], None)


def test_no_platform_at_all_keeps_every_reason():
    with pytest.raises(PlatformError, match="no platform can run here: cuda: no cuda device"):
        select_platform([provider("cuda", devices=0)], None)


def test_a_device_that_the_platform_refuses_is_not_chosen_by_auto_and_an_error_when_asked_for():
    old = provider("cuda", capability=(6, 1), least=(7, 5))
    selection = select_platform([old, provider("cpu")], None)
    assert selection.provider.name == "cpu"
    assert "compute capability 6.1; cuda needs 7.5" in selection.candidates[0].reason
    with pytest.raises(PlatformError, match="platform 'cuda' was asked for but .* compute capability 6.1"):
        select_platform([old, provider("cpu")], "cuda")
