"""Our own Triton kernels as a provider of flash attention: where they run, and what they can do. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec

from ....cache.specs import AttentionSpec
from ....config import LAYOUTS
from ....device import DeviceFacts
from ....errors import BackendError
from ...interface import AttentionImpl, BuildRequest, Capabilities, LayerRequest, Probe
from ...workspace import StepLimits, Workspace
from ..providers import FlashProvider, build_refusals
from .configs import invariant_rows
from .scratch import latent_workspace, workspace_of

HALF = frozenset({"bfloat16", "float16"})
FP8 = frozenset({"fp8_e4m3", "fp8_e5m2"})
INSTALL = "pip install 'triton>=3.6'"
LEAST = (3, 6)
LEAST_CAPABILITY = (8, 0)
FP8_CAPABILITY = (8, 9)
HEAD_SIZE_MULTIPLE = 8
MAX_HEAD_SIZE = 256


def installed_version() -> str | None:
    """The version of Triton that would be imported, without importing it; ``None`` where there is none."""
    for distribution in ("triton", "pytorch-triton-xpu", "pytorch-triton-rocm", "triton-xpu"):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return "0" if find_spec("triton") is not None else None


class TritonProvider(FlashProvider):
    """The kernels of this package, on any device that Triton compiles for.

    :param version: the installed version of Triton, or ``None``.
    """

    name = "triton"
    device_types = frozenset({"cuda", "xpu"})

    def __init__(self, version: Callable[[], str | None] = installed_version) -> None:
        self._version = version

    def constraints(self, device: DeviceFacts) -> Capabilities:
        """Any block size of a multiple of 16, any layout, 64-bit addresses; a token's numbers in one piece."""
        capability = device.compute_capability
        fp8 = FP8 if capability is None or capability >= FP8_CAPABILITY else frozenset({"fp8_e5m2"})
        return Capabilities(
            name="flash",
            owner="flash by triton",
            dtypes=HALF,
            kv_cache_dtypes=HALF | fp8,
            kernel_block_multiple=16,
            head_size_multiple=HEAD_SIZE_MULTIPLE,
            max_head_size=MAX_HEAD_SIZE,
            layouts=LAYOUTS,
            batch_invariant=True,
            sliding_window=True,
            soft_cap=True,
            sinks=True,
            encoder_only=True,
            mla=True,
        )

    def spec_refusal(self, spec: AttentionSpec) -> str | None:
        """V's head size is bound as K's is."""
        if spec.mla or (spec.head_size_v <= MAX_HEAD_SIZE and spec.head_size_v % HEAD_SIZE_MULTIPLE == 0):
            return None
        return (
            f"reads head sizes of a multiple of {HEAD_SIZE_MULTIPLE} up to {MAX_HEAD_SIZE}, not V's {spec.head_size_v}"
        )

    def invariance_refusal(self, spec: AttentionSpec, device: DeviceFacts) -> str | None:
        """Under batch invariance the tile is fixed, and must hold the query heads of a KV head."""
        if spec.mla:
            return "takes tiles of latents by how many tokens a request brings, which batch_invariant forbids"
        size, group = max(spec.head_size, spec.head_size_v), spec.num_query_heads // spec.num_kv_heads
        tile = invariant_rows(device, size)
        if group <= tile:
            return None
        return (
            f"has tiles of {tile} rows at head size {size} under batch_invariant, and a KV head has {group} query heads"
        )

    def workspace(self, request: LayerRequest, device: DeviceFacts, limits: StepLimits) -> Workspace:
        """Partial sums, and the copy of K and V that a long prefill reads; latents are read in their pages."""
        if request.spec.mla:
            return latent_workspace(request.spec, device)
        return workspace_of(request.spec, device, limits, invariant=request.batch_invariant)

    def probe(self, device: DeviceFacts) -> Probe:
        """Triton is missing, too old, or the device is; else ours."""
        refusal = self._why_not(device)
        if refusal is not None:
            return Probe(available=False, reason=refusal)
        return Probe(available=True, reason=f"makeready's own kernels, compiled by Triton {self._version()}")

    def build(self, request: BuildRequest) -> AttentionImpl:
        """The kernels ready to run; each is compiled when the first step needs it.

        :raises BackendError: where Triton or the device is too old, and for a request outside :meth:`constraints`.
        """
        refusal = self._why_not(request.device) or "; ".join(build_refusals(self, request))
        if refusal:
            raise BackendError(
                f"flash by triton: {refusal}",
                option="flash_provider",
                value=self.name,
                expected="another provider or backend",
            )
        from .impl import TritonImpl

        return TritonImpl(request, request.device.compute_units or _compute_units(request.device))

    def _why_not(self, device: DeviceFacts) -> str | None:
        """The first thing in the way, or ``None``."""
        version = self._version()
        if version is None:
            return f"Triton is not installed ({INSTALL})"
        if version != "0" and _release(version) < LEAST:
            return f"Triton {version} is installed, and the kernels need {LEAST[0]}.{LEAST[1]} or newer ({INSTALL})"
        capability = device.compute_capability
        if capability is not None and capability < LEAST_CAPABILITY:
            return (
                f"the kernels need compute capability {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]}, and "
                f"{device.name} has {capability[0]}.{capability[1]}"
            )
        return None


def _compute_units(device: DeviceFacts) -> int:
    """Multiprocessors of the device, as torch says."""
    import torch

    if device.device_type == "cuda":
        return torch.cuda.get_device_properties(device.index).multi_processor_count
    properties = torch.xpu.get_device_properties(device.index)
    return int(getattr(properties, "gpu_subslice_count", 0) or properties.max_compute_units)


def _release(version: str) -> tuple[int, ...]:
    """``(3, 6)`` of ``3.6.0+git``."""
    parts = version.split(".")[:2]
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)
