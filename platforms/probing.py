"""Looks for devices: the only file of ``platforms/`` that imports torch, and only inside functions.

A probe never raises. Its reason says what was found or what is missing, and how to get it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType

from ..device import DeviceFacts, format_bytes
from . import cpu_facts
from .provider import ProbeResult, describe_exception
from .software import IPEX, TRITON_PACKAGES, XPU_KERNELS, installed_versions, ipex_clash, triton_clash

NO_TORCH = "torch is not installed (pip install 'makeready[engine]')"


def probe_cpu() -> ProbeResult:
    """This machine's CPU: cores, memory and instruction set. Imports no torch and is always available."""
    versions = installed_versions("torch", IPEX)
    cores, memory, isa = cpu_facts.core_count(), cpu_facts.memory_bytes(), cpu_facts.isa()
    device = DeviceFacts(
        platform="cpu",
        device_type="cpu",
        name=cpu_facts.model_name(),
        memory_bytes=memory,
        compute_units=cores,
        isa=isa,
        versions=versions,
    )
    reason = (
        f"{device.name}: {cores} cores, {format_bytes(memory) if memory else 'unknown memory'}, "
        f"{isa or 'no vector instruction set that kernels choose by'}"
    )
    if "torch" not in dict(versions):
        reason += f"; {NO_TORCH}, so models can be planned but not run"
    return ProbeResult(available=True, reason=_with_notes(reason, ipex_clash()), devices=(device,), versions=versions)


def probe_cuda() -> ProbeResult:
    """NVIDIA devices that torch can use."""
    versions = installed_versions("torch", *TRITON_PACKAGES)
    return _guarded(_find_cuda, "CUDA", versions)


def probe_xpu() -> ProbeResult:
    """Intel GPUs that torch can use. IPEX and vllm-xpu-kernels are named, not imported."""
    versions = installed_versions("torch", *TRITON_PACKAGES, IPEX, XPU_KERNELS)
    found = _guarded(_find_xpu, "XPU", versions)
    return ProbeResult(
        available=found.available,
        reason=_with_notes(found.reason, _ipex_note(versions)),
        devices=found.devices,
        versions=versions,
    )


def _guarded(
    find: Callable[[ModuleType, tuple[tuple[str, str], ...]], ProbeResult],
    what: str,
    versions: tuple[tuple[str, str], ...],
) -> ProbeResult:
    """Run ``find`` with torch; turn what fails, and what torch warns of, into the reason."""
    try:
        if find_spec("torch") is None:
            reason = _with_notes(f"no {what} device: {NO_TORCH}", triton_clash())
            return ProbeResult(available=False, reason=reason, versions=versions)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            import torch

            result = find(torch, versions)
    except (Exception, SystemExit) as error:  # a driver that does not fit raises anything; it all means no device
        reason = f"no {what} device: torch could not be asked ({describe_exception(error)})"
        return ProbeResult(available=False, reason=_with_notes(reason, triton_clash()), versions=versions)
    said = None if result.available else next((" ".join(str(w.message).split()) for w in warned), None)
    return ProbeResult(
        available=result.available,
        reason=_with_notes(result.reason, said and f"torch warned: {said}", triton_clash()),
        devices=result.devices,
        versions=versions,
    )


def _find_cuda(torch: ModuleType, versions: tuple[tuple[str, str], ...]) -> ProbeResult:
    if torch.version.cuda is None:
        built = f"for ROCm {torch.version.hip}" if torch.version.hip else "without CUDA"
        return _none(f"no CUDA device: torch {torch.__version__} is built {built}; install a CUDA build of torch")
    if not torch.cuda.is_available():
        return _none(
            f"no CUDA device: torch {torch.__version__} is built for CUDA {torch.version.cuda} but finds no "
            f"usable driver or device (see nvidia-smi and CUDA_VISIBLE_DEVICES)"
        )
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    devices = tuple(
        DeviceFacts(
            platform="cuda",
            device_type="cuda",
            name=found.name,
            index=index,
            memory_bytes=found.total_memory,
            compute_capability=(found.major, found.minor),
            compute_units=found.multi_processor_count,
            versions=(*versions, ("cuda", str(torch.version.cuda))),
        )
        for index, found in enumerate(properties)
    )
    return _found(devices, f"torch {torch.__version__}, CUDA {torch.version.cuda}")


def _find_xpu(torch: ModuleType, versions: tuple[tuple[str, str], ...]) -> ProbeResult:
    xpu = getattr(torch, "xpu", None)
    if xpu is None or not xpu._is_compiled():
        return _none(
            f"no XPU device: torch {torch.__version__} is built without XPU; install it from "
            f"https://download.pytorch.org/whl/xpu"
        )
    if not xpu.is_available():
        return _none(
            f"no XPU device: torch {torch.__version__} is built for XPU but finds no usable driver or device "
            f"(see sycl-ls and ZE_AFFINITY_MASK)"
        )
    properties = [xpu.get_device_properties(index) for index in range(xpu.device_count())]
    devices = tuple(
        DeviceFacts(
            platform="xpu",
            device_type="xpu",
            name=found.name,
            index=index,
            memory_bytes=found.total_memory,
            compute_units=getattr(found, "gpu_subslice_count", None),
            versions=versions,
        )
        for index, found in enumerate(properties)
    )
    return _found(devices, f"torch {torch.__version__}")


def _none(reason: str) -> ProbeResult:
    return ProbeResult(available=False, reason=reason)


def _found(devices: tuple[DeviceFacts, ...], software: str) -> ProbeResult:
    listed = ", ".join(
        f"{device.name} ({format_bytes(device.memory_bytes) if device.memory_bytes else 'unknown memory'})"
        for device in devices
    )
    count = f"{len(devices)} device{'s' if len(devices) != 1 else ''}"
    return ProbeResult(available=bool(devices), reason=f"{count}: {listed}; {software}", devices=devices)


def _ipex_note(versions: tuple[tuple[str, str], ...]) -> str:
    installed = dict(versions)
    if IPEX in installed:
        return ipex_clash() or f"{IPEX} {installed[IPEX]} is installed"
    return (
        f"{IPEX} (IPEX) is not installed (pip install './plugins/wheels/makeready-xpu[ipex]', in a clone of "
        "makeready's repository)"
    )


def _with_notes(reason: str, *notes: str | None) -> str:
    return "; ".join((reason, *(note for note in notes if note)))
