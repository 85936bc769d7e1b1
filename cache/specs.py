"""What one layer stores: bytes per token of attention, bytes per request of a state. No torch: dtypes are names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

from ..errors import ConfigError

DTYPE_BYTES: Mapping[str, int] = MappingProxyType(
    {"float32": 4, "bfloat16": 2, "float16": 2, "fp8_e4m3": 1, "fp8_e5m2": 1, "int8": 1, "uint8": 1}
)
"""Bytes of one element of a plain dtype."""

QUANTISED_KV: tuple[str, ...] = (
    "nvfp4", "int8_per_token_head", "fp8_per_token_head", "int4_per_token_head"
)  # fmt: skip
"""KV dtypes whose pages hold scales beside the values."""

LATENT_BLOBS: Mapping[str, int] = MappingProxyType({"fp8_ds_mla": 656, "nvfp4_ds_mla": 352})
"""KV dtypes of a latent cache (MLA) that pack a token into a fixed number of bytes, scales included (vLLM 0.33)."""


def dtype_bytes(name: str) -> int:
    """Bytes of one element of dtype ``name``.

    :raises ConfigError: for a name that is not a plain dtype.
    """
    try:
        return DTYPE_BYTES[name]
    except KeyError:
        raise ConfigError(
            f"dtype {name!r} is not known; known are {', '.join(DTYPE_BYTES)}",
            option="dtype",
            value=name,
            expected=list(DTYPE_BYTES),
        ) from None


def is_plain(name: str) -> bool:
    """Whether every element of dtype ``name`` is stored by itself, without scales."""
    return name in DTYPE_BYTES


def resolve_kv_cache_dtype(kv_cache_dtype: str, model_dtype: str) -> str:
    """The stored dtype: ``auto`` is the model's, ``fp8`` is e4m3."""
    return {"auto": model_dtype, "fp8": "fp8_e4m3"}.get(kv_cache_dtype, kv_cache_dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """K and V of one attention layer, on one rank.

    ``dtype`` is the resolved KV dtype. For MLA, ``num_kv_heads`` is 1, ``head_size`` the latent width
    (kv_lora_rank) and ``head_size_v`` the rotary width; both are stored once per token.
    """

    num_query_heads: int
    num_kv_heads: int
    head_size: int
    head_size_v: int
    dtype: str
    sliding_window: int | None = None
    mla: bool = False
    page_alignment: int = 1
    """Bytes that every page is rounded up to a multiple of."""

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes in this layer (source: vLLM 0.33's page rules, see docs/planning.md)."""
        if self.dtype in LATENT_BLOBS:
            return LATENT_BLOBS[self.dtype]
        widths = self.num_kv_heads * (self.head_size + self.head_size_v)
        if self.dtype == "nvfp4":
            return widths // 2 + widths // 16
        if self.dtype in ("int8_per_token_head", "fp8_per_token_head"):
            return widths + 8 * self.num_kv_heads
        if self.dtype == "int4_per_token_head":
            return widths // 2 + 8 * self.num_kv_heads
        return widths * dtype_bytes(self.dtype)

    def page_size_bytes(self, block_size: int) -> int:
        """Bytes of one page: ``block_size`` tokens of this layer, rounded up to ``page_alignment``."""
        return -(-self.bytes_per_token * block_size // self.page_alignment) * self.page_alignment


@dataclass(frozen=True, slots=True, kw_only=True)
class StateTensor:
    """One tensor of a state: ``conv`` (channels and columns) or ``recurrent``."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size_bytes(self) -> int:
        """Bytes of this tensor for one request."""
        return prod(self.shape) * dtype_bytes(self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class MambaSpec:
    """What a state layer keeps per request, on one rank. ``kind`` names its mixer."""

    kind: str
    states: tuple[StateTensor, ...]

    @property
    def state_bytes(self) -> int:
        """Raw bytes of one state, without padding."""
        return sum(state.size_bytes for state in self.states)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One thing that a model's layer stores. A layer with attention *and* a state has two of these."""

    layer: int
    """Index of the model's layer; what the host engine calls ``layer_idx``."""
    spec: AttentionSpec | MambaSpec

    @property
    def is_state(self) -> bool:
        """True for a state layer."""
        return isinstance(self.spec, MambaSpec)

    @property
    def kind(self) -> str:
        """``attention``, ``sliding``, ``mla``, or the mixer's name."""
        if isinstance(self.spec, MambaSpec):
            return self.spec.kind
        if self.spec.mla:
            return "mla"
        return "sliding" if self.spec.sliding_window is not None else "attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroup:
    """Layers that share block tables: one block of the group holds one page of each of them."""

    index: int
    kind: str
    layers: tuple[LayerSpec, ...]
    block_size: int
    """Tokens of one block; for states that are kept per request, the longest sequence."""

    @property
    def is_state(self) -> bool:
        """True for a group of state layers."""
        return self.layers[0].is_state
