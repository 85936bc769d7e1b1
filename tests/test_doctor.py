"""The doctor's report: everything that was found, each with its reason, as JSON."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from types import ModuleType

from makeready.attention_backends.reference import ReferenceBackend
from makeready.platforms.interface import Platform
from makeready.platforms.provider import PlatformProvider
from makeready.plugins.doctor import examine
from makeready.plugins.hookspecs import hookimpl
from makeready.plugins.manager import load_plugins


class RudeBackend(ReferenceBackend):
    name = "rude"

    def probe(self, device):
        raise OSError("no such driver")


def rude_plugin() -> ModuleType:
    """A vendor whose probes raise, which they must not."""

    def probe():
        raise OSError("libacme.so is gone")

    acme = Platform(name="acme", device_type="cpu")
    given = PlatformProvider(name="acme", platform=acme, probe=probe, distribution="makeready-acme")
    module = ModuleType("acme")
    module.makeready_platforms = hookimpl(lambda: [given])
    module.makeready_attention_backends = hookimpl(lambda device: [RudeBackend()])
    return module


def platforms(report) -> dict:
    return {platform["name"]: platform for platform in report.to_dict()["platforms"]}


def test_without_plugins_cpu_is_chosen_and_the_wheels_are_named():
    report = examine(load_plugins(entry_points=()))
    assert (report.auto, report.problems) == ("cpu", ())
    seen = platforms(report)
    assert seen["cpu"]["chosen"]
    assert {"flash", "flex", "reference"} <= {backend["name"] for backend in seen["cpu"]["backends"]}
    assert all(backend["reason"] for backend in seen["cpu"]["backends"])
    assert "pip install ./plugins/wheels/makeready-cuda" in seen["cuda"]["reason"]
    assert "pip install ./plugins/wheels/makeready-xpu" in seen["xpu"]["reason"]


def test_the_report_is_json_and_lists_software_that_is_not_there():
    report = json.loads(json.dumps(examine(load_plugins(entry_points=())).to_dict()))
    assert "torch" in report["software"]
    assert "intel-extension-for-pytorch" in report["software"]
    assert report["python"].startswith("3.")


def test_a_broken_plugin_is_shown_and_auto_refuses_to_choose():
    points = [EntryPoint("acme", "not_there", "makeready")]
    report = examine(load_plugins(entry_points=points))
    assert report.auto is None
    assert "No module named 'not_there'" in report.auto_reason
    assert report.to_dict()["problems"][0]["name"] == "acme"
    assert platforms(report)["cpu"]["available"]


def test_probes_that_raise_are_shown_and_the_report_goes_on():
    report = examine(load_plugins(entry_points=(), extra=[("acme", rude_plugin())]))
    seen = platforms(report)
    assert "raised OSError: libacme.so is gone" in seen["acme"]["reason"]
    rude = next(backend for backend in seen["cpu"]["backends"] if backend["name"] == "rude")
    assert (rude["available"], rude["reason"]) == (False, "its probe raised OSError: no such driver, which it must not")
    assert report.auto is None  # launch would refuse too: the probe may have meant "yes"
    assert [(problem.name, problem.stage) for problem in report.problems] == [("acme", "probe")]


def test_what_a_device_rules_out_is_said_before_what_is_not_installed():
    seen = platforms(examine(load_plugins(entry_points=())))
    triton = next(mixer for mixer in seen["cpu"]["mixers"] if mixer["name"] == "triton")
    assert triton["reason"] == "triton has kernels for cuda, xpu, not for cpu"
    flash = next(backend for backend in seen["xpu"]["backends"] if backend["name"] == "flash")
    ipex = next(provider for provider in flash["providers"] if provider["name"] == "ipex")
    assert "is not used on XPU" in ipex["reason"]
    assert "pip install" not in ipex["reason"]
