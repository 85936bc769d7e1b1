"""Probes answer with a reason whatever they find, and never raise."""

from __future__ import annotations

import sys
import warnings
from importlib import metadata
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from makeready.platforms import cpu_facts, probing, software
from makeready.platforms.probing import probe_cpu, probe_cuda, probe_xpu

CPUINFO = "processor\t: 0\nmodel name\t: Acme 9000\nflags\t\t: fpu avx2 fma avx512f avx512bw avx512vl {}\n"


@pytest.fixture
def installed(monkeypatch):
    """Pretend that exactly these distributions are installed."""

    def pretend(**versions: str) -> None:
        known = {name.replace("_", "-"): version for name, version in versions.items()}

        def version(name: str) -> str:
            if name not in known:
                raise metadata.PackageNotFoundError(name)
            return known[name]

        monkeypatch.setattr(software.metadata, "version", version)

    return pretend


@pytest.fixture
def fake_torch(monkeypatch):
    """Put a module named torch in place, so that every device can be probed on a machine without it."""

    def put(**attributes) -> None:
        fake = SimpleNamespace(__version__="2.13.0", **attributes)
        monkeypatch.setattr(probing, "find_spec", lambda name: object())
        monkeypatch.setitem(sys.modules, "torch", fake)

    return put


def test_the_cpu_is_always_available():
    result = probe_cpu()
    assert result.available
    (device,) = result.devices
    assert (device.platform, device.device_type, device.present) == ("cpu", "cpu", True)
    assert device.compute_units >= 1
    assert device.memory_bytes > 2**20
    assert f"{device.compute_units} cores" in result.reason


def test_the_cpu_without_torch_says_what_is_missing(installed):
    installed()
    assert "torch is not installed (pip install 'makeready[engine]')" in probe_cpu().reason


@pytest.mark.parametrize(
    ("flags", "isa"), [("", "AVX512"), ("avx512_bf16", "AVX512_BF16"), ("avx512_bf16 amx_tile amx_bf16", "AMX")]
)
def test_the_best_instruction_set_is_named(tmp_path, flags, isa):
    file = tmp_path / "cpuinfo"
    file.write_text(CPUINFO.format(flags))
    assert cpu_facts.isa(file) == isa
    assert cpu_facts.model_name(file) == "Acme 9000"


def test_arm_flags_and_systems_that_say_nothing(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("Features\t: fp asimd sve\n")
    assert cpu_facts.isa(file) == "SVE"
    assert cpu_facts.isa(tmp_path / "not there") is None
    assert cpu_facts.model_name(tmp_path / "not there")


def test_memory_is_the_container_s_limit_if_that_is_lower(tmp_path):
    meminfo, limit = tmp_path / "meminfo", tmp_path / "memory.max"
    meminfo.write_text("MemTotal:       4194304 kB\nMemFree: 1 kB\n")
    assert cpu_facts.memory_bytes(meminfo, limit) == 4 * 2**30
    limit.write_text("max\n")
    assert cpu_facts.memory_bytes(meminfo, limit) == 4 * 2**30
    limit.write_text(f"{2**30}\n")
    assert cpu_facts.memory_bytes(meminfo, limit) == 2**30


@pytest.mark.parametrize("probe", [probe_cuda, probe_xpu])
def test_accelerators_without_torch_are_refused_with_what_to_install(probe, monkeypatch):
    monkeypatch.setattr(probing, "find_spec", lambda name: None)
    result = probe()
    assert not result.available
    assert result.devices == ()
    assert "torch is not installed (pip install 'makeready[engine]')" in result.reason


@pytest.mark.parametrize("probe", [probe_cuda, probe_xpu])
def test_a_torch_that_raises_is_a_reason(probe, monkeypatch):
    monkeypatch.setattr(probing, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "torch could not be asked (ModuleNotFoundError" in probe().reason


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
def test_the_real_torch_answers_with_sentences():
    for probe, device in ((probe_cuda, "CUDA"), (probe_xpu, "XPU")):
        result = probe()
        assert result.available == bool(result.devices)
        assert result.available or f"no {device} device" in result.reason


def test_a_torch_built_without_cuda_or_for_rocm(fake_torch):
    fake_torch(version=SimpleNamespace(cuda=None, hip=None))
    assert "torch 2.13.0 is built without CUDA" in probe_cuda().reason
    fake_torch(version=SimpleNamespace(cuda=None, hip="6.4"))
    assert "built for ROCm 6.4" in probe_cuda().reason


def test_a_cuda_torch_without_a_driver_keeps_torch_s_own_warning(fake_torch):
    def is_available() -> bool:
        warnings.warn("CUDA initialization: the driver is too old", stacklevel=1)
        return False

    fake_torch(version=SimpleNamespace(cuda="13.0", hip=None), cuda=SimpleNamespace(is_available=is_available))
    reason = probe_cuda().reason
    assert "built for CUDA 13.0 but finds no usable driver" in reason
    assert "torch warned: CUDA initialization: the driver is too old" in reason


def test_cuda_devices_are_facts(fake_torch):
    properties = SimpleNamespace(name="H200", total_memory=141 * 2**30, major=9, minor=0, multi_processor_count=132)
    fake_torch(
        version=SimpleNamespace(cuda="13.0", hip=None),
        cuda=SimpleNamespace(
            is_available=lambda: True, device_count=lambda: 2, get_device_properties=lambda index: properties
        ),
    )
    result = probe_cuda()
    assert result.available
    assert [device.index for device in result.devices] == [0, 1]
    assert result.devices[1].compute_capability == (9, 0)
    assert result.devices[1].compute_units == 132
    assert ("cuda", "13.0") in result.devices[1].versions
    assert "2 devices: H200 (141.00 GiB), H200 (141.00 GiB)" in result.reason


def test_xpu_devices_are_facts_and_ipex_is_named(fake_torch, installed):
    installed(torch="2.8.0", intel_extension_for_pytorch="2.8.0")
    properties = SimpleNamespace(name="Arc B580", total_memory=12 * 2**30, gpu_subslice_count=20)
    fake_torch(
        xpu=SimpleNamespace(
            _is_compiled=lambda: True,
            is_available=lambda: True,
            device_count=lambda: 1,
            get_device_properties=lambda index: properties,
        )
    )
    result = probe_xpu()
    assert result.available
    assert result.devices[0].compute_units == 20
    assert "intel-extension-for-pytorch 2.8.0 is installed" in result.reason


def test_ipex_that_is_missing_or_does_not_load_in_this_torch_is_named(installed):
    installed(torch="2.13.0+cpu")
    assert "(IPEX) is not installed (pip install './plugins/wheels/makeready-xpu[ipex]'" in probe_xpu().reason
    installed(torch="2.13.0+cpu", intel_extension_for_pytorch="2.8.0")
    assert "loads only in torch 2.8.*, found torch 2.13.0+cpu" in probe_xpu().reason
    assert "loads only in torch 2.8.*" in probe_cpu().reason


def test_two_packages_in_the_folder_triton_are_named(installed):
    installed(triton="3.7.1", torch="2.13.0")
    assert software.triton_clash() is None
    installed(triton="3.7.1", pytorch_triton_xpu="3.5.0", torch="2.13.0")
    assert "triton 3.7.1 and pytorch-triton-xpu 3.5.0 are both installed" in software.triton_clash()
    assert "overwrite each other" in probe_cuda().reason
