"""What the Triton mixers declare. No torch and no triton here: ``plan`` reads it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from ....attention_backends.interface import Capabilities, Probe
from ....config import DTYPES
from ....device import DeviceFacts
from ..backend import MIXERS, MixerBackend
from ..environment import interpreted

if TYPE_CHECKING:
    from ..interface import MixerKernels


class TritonMixerBackend(MixerBackend):
    """One-step kernels for decodes (capturable), and scans over packed requests."""

    name = "triton"

    def capabilities(self, device: DeviceFacts) -> Capabilities:
        """All plain dtypes where Triton compiles: CUDA and XPU; a CPU has Triton's interpreter, for tests."""
        served = device.device_type in ("cuda", "xpu") or interpreted()
        return Capabilities(
            name=self.name,
            dtypes=frozenset(DTYPES if served else ()),
            kv_cache_dtypes=frozenset(DTYPES),
            is_ssm=True,
            batch_invariant=True,
        )

    def mixers(self, device: DeviceFacts) -> frozenset[str]:
        """All that the interface has."""
        return frozenset(MIXERS)

    def probe(self, device: DeviceFacts) -> Probe:
        """A device that Triton compiles for, and Triton installed; kernels are compiled when a layer first runs."""
        if not self.capabilities(device).dtypes:
            return Probe(available=False, reason=f"triton has kernels for cuda, xpu, not for {device.device_type}")
        for package in ("torch", "triton"):
            if find_spec(package) is None:
                return Probe(
                    available=False, reason=f"triton needs {package}, which is not installed: pip install {package}"
                )
        if interpreted():
            return Probe(available=True, reason="triton runs in its interpreter, as TRITON_INTERPRET asks")
        return Probe(available=True, reason="triton is installed and compiles kernels when they first run")

    def build(self, device: DeviceFacts) -> MixerKernels:
        """Nothing is compiled or allocated yet."""
        from .mixers import TritonMixers

        return TritonMixers()
