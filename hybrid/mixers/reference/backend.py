"""What the reference mixers declare. No torch here: ``plan`` reads it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from ....attention_backends.interface import Capabilities, Probe
from ....config import DTYPES, AttentionConfig
from ....device import DeviceFacts
from ..backend import MIXERS, MixerBackend

if TYPE_CHECKING:
    from ..interface import MixerKernels


class ReferenceMixerBackend(MixerBackend):
    """Eager torch operations: every mixer on every device."""

    name = "reference"

    def __init__(self, *, alone: bool = False) -> None:
        self._alone = alone

    def capabilities(self, device: DeviceFacts) -> Capabilities:
        """All plain dtypes; batch invariant once it is asked."""
        return Capabilities(
            name=self.name,
            dtypes=frozenset(DTYPES),
            kv_cache_dtypes=frozenset(DTYPES),
            is_ssm=True,
            batch_invariant=self._alone,
        )

    def configured(self, config: AttentionConfig, device: DeviceFacts) -> ReferenceMixerBackend:
        """With ``batch_invariant`` each request is computed alone, since torch may batch decodes as it likes."""
        return ReferenceMixerBackend(alone=config.batch_invariant)

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

        return ReferenceMixers(alone=self._alone)
