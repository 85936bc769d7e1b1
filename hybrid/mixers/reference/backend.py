"""What the reference mixers declare. No torch here: ``plan`` reads it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from ....attention_backends.interface import Capabilities, Probe
from ....config import DTYPES
from ....device import DeviceFacts
from ..backend import MIXERS, MixerBackend

if TYPE_CHECKING:
    from ..interface import MixerKernels


class ReferenceMixerBackend(MixerBackend):
    """Eager torch operations: every mixer on every device."""

    name = "reference"

    def capabilities(self, device: DeviceFacts) -> Capabilities:
        """All plain dtypes; a long request is computed alone, but torch may batch decodes as it likes."""
        return Capabilities(name=self.name, dtypes=frozenset(DTYPES), kv_cache_dtypes=frozenset(DTYPES), is_ssm=True)

    def mixers(self, device: DeviceFacts) -> frozenset[str]:
        """All that the interface has."""
        return frozenset(MIXERS)

    def probe(self, device: DeviceFacts) -> Probe:
        """Torch is all that it takes."""
        if find_spec("torch") is None:
            return Probe(available=False, reason="reference needs torch, which is not installed: pip install torch")
        return Probe(available=True, reason="reference runs on every device that torch knows")

    def build(self, device: DeviceFacts) -> MixerKernels:
        """Nothing is compiled or allocated."""
        from .kernels import ReferenceMixers

        return ReferenceMixers()
