"""What a block size is decided from, and what is decided: frozen records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ..attention_backends.interface import Capabilities
from ..cache.block_size import Constraint
from ..cache.specs import AttentionSpec, MambaSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSizeRequest:
    """What a block size is decided from."""

    attention: tuple[AttentionSpec, ...] = ()
    """What attention layers store; repeats do no harm."""
    states: tuple[MambaSpec, ...] = ()
    """What state layers keep."""
    backends: tuple[Capabilities, ...] = ()
    """Backends of the attention layers; state mixers among them (``is_ssm``) are left out."""
    preferred_block_sizes: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    """Per backend name the size it would choose, where it is not the next that its rules allow."""
    block_size: int | None = None
    """The user's, in tokens; checked and kept."""
    mamba_block_size: int | None = None
    """The user's distance between kept states, in tokens; respected or refused."""
    mamba_cache_mode: str = "none"
    max_model_len: int
    """Longest sequence, in tokens."""
    prefill_checkpoint_alignment: int | None = None
    """Tokens: state kernels can only stop at multiples of this (FlashInfer's gated delta net: 64)."""
    page_strategy: str = "unified"
    """``unified``: a block holds the largest state. ``subdivided``: states take blocks of their own."""
    state_tokens: int = 1
    """Tokens whose K and V, over all layers, take as much memory as all states of a request."""
    quantised_dtype: str | None = None
    """KV dtype that unified blocks are sized for, where some layers keep another one and the engine, as vLLM, gives
    every kind of layer blocks of its own length; ``None`` where all layers have blocks of one length."""
    extra_constraints: tuple[Constraint, ...] = ()
    """What plugins add."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSizeDecision:
    """The decided sizes, in tokens and bytes, and why."""

    block_size: int
    kernel_block_sizes: Mapping[str, int]
    """Per attention backend what its kernel indexes, in tokens."""
    attention_bytes_per_token: int
    attention_page_bytes: int
    state_raw_bytes: int
    state_page_bytes: int
    """What the largest state takes of the pool, in bytes; 0 without states. Subdivided pages do not pad it."""
    mamba_page_size_padded: int | None
    """What states are padded to; ``None`` where the largest fills its page exactly."""
    mamba_block_size: int | None
    """Tokens between kept states; the longest sequence in mode ``none``; ``None`` without states."""
    mamba_cache_mode: str
    phase1_block_size: int
    page_bytes: int
    """The one page size of the pool; with subdivided pages, that of the widest attention layer."""
    page_strategy: str
    constraints: tuple[Constraint, ...]
    """Everything that had to hold for ``block_size``."""
    reasons: tuple[str, ...]
    block_sizes: Mapping[AttentionSpec, int] = field(default_factory=lambda: MappingProxyType({}))
    """Tokens of a block per kind of attention layer, where kinds differ; empty where all have ``block_size``."""
    own_pages: bool = False
    """True where every layer of the one group keeps a page of its own size, as vLLM does for full attention alone."""

    def block_size_of(self, spec: AttentionSpec) -> int:
        """Tokens of one block of layers of this kind."""
        return self.block_sizes.get(spec, self.block_size)
