"""What the reference declares. No torch here: ``plan`` reads it."""

from __future__ import annotations

from importlib.util import find_spec

from ...config import DTYPES, LAYOUTS
from ...device import DeviceFacts
from ..interface import AttentionBackend, AttentionImpl, BuildRequest, Capabilities, Probe


class ReferenceBackend(AttentionBackend):
    """Eager torch operations, request after request: every feature, every block size, no speed."""

    name = "reference"

    def capabilities(self, device: DeviceFacts) -> Capabilities:
        """Everything that plain K and V allow; each request is computed alone, so the batch cannot matter."""
        return Capabilities(
            name=self.name,
            dtypes=frozenset(DTYPES),
            kv_cache_dtypes=frozenset(DTYPES),
            layouts=LAYOUTS,
            batch_invariant=True,
            sliding_window=True,
            soft_cap=True,
            sinks=True,
            encoder_only=True,
            mla=True,
        )

    def probe(self, device: DeviceFacts) -> Probe:
        """Torch is all that it takes."""
        if find_spec("torch") is None:
            return Probe(available=False, reason="reference needs torch, which is not installed: pip install torch")
        return Probe(available=True, reason="reference runs on every device that torch knows")

    def build(self, request: BuildRequest) -> AttentionImpl:
        """One implementation serves every request; nothing is compiled or allocated."""
        from .impl import ReferenceAttention

        return ReferenceAttention()
