"""Configurations of the kernels as a pure table: device facts and shapes in, numbers out. No torch, no Triton."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ....device import DeviceFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig:
    """How decode is compiled and shared out."""

    tile: int
    """KV tokens of one step of a program."""
    warps: int
    stages: int
    swap: bool
    """Keys, not queries, are the rows of the matrix products."""
    programs: int
    """Programs for each compute unit."""
    rows: int = 16
    """Fewest rows (query tokens times query heads of a KV head) of a tile."""
    evict: bool = False
    """K and V are marked as the first to leave the cache."""
    fixed: int = 0
    """Tiles of a segment in the batch-invariant mode; 0 outside it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillConfig:
    """How prefill is compiled."""

    block_m: int
    """Rows of a tile."""
    block_n: int
    """KV tokens of one step of a program."""
    warps: int
    stages: int
    source: str
    """Where K and V are read: ``pages``, ``page tiles``, ``gathered`` or ``copies``."""
    fixed: int = 0
    """KV tiles of a segment in the batch-invariant mode; 0 outside it."""


SEGMENT = 2048
"""Tokens of a segment in the batch-invariant mode, for models of up to 32 segments."""
LONG_QUERIES = 128
"""Query tokens a request, on average, from which a copy of its K and V in one piece pays."""


def short_queries(group: int) -> int:
    """Most query tokens of a request that decode's kernel serves: 64 rows of a tile."""
    return max(1, 64 // group)


def invariant_tiles(tile: int, max_model_len: int) -> int:
    """Tiles of a segment: a number that follows from the build alone, so that a request's sums do."""
    segment = SEGMENT
    while segment * 32 < max_model_len:
        segment *= 2
    return segment // tile


def decode_config(
    device: DeviceFacts, *, head_size: int, rows: int, narrow: bool, invariant: bool, max_model_len: int
) -> DecodeConfig:
    """How decode runs.

    :param head_size: as padded to a power of two.
    :param rows: query tokens times query heads of a KV head.
    :param narrow: K and V are stored in one byte a number.
    """
    config = _decode(device, head_size, narrow)
    if invariant:
        return replace(config, fixed=invariant_tiles(config.tile, max_model_len))
    return config


def _decode(device: DeviceFacts, head_size: int, narrow: bool) -> DecodeConfig:
    if _is_hopper(device) and not narrow:
        if head_size <= 128:
            return DecodeConfig(tile=64, warps=4, stages=3, swap=True, programs=2)
        return DecodeConfig(tile=32, warps=2, stages=3, swap=False, programs=3)
    if head_size <= 128:
        return DecodeConfig(tile=64, warps=4, stages=3, swap=False, programs=2)
    return DecodeConfig(tile=32, warps=4, stages=3, swap=False, programs=2)


def prefill_config(
    device: DeviceFacts, head_size: int, head_size_v: int, group: int, *, queries: int, keys: int, block_size: int,
    causal: bool, narrow: bool, invariant: bool, max_model_len: int,
) -> PrefillConfig:  # fmt: skip
    """How prefill runs.

    :param queries: query tokens of the step's prefills.
    :param keys: tokens in the cache of the same requests.
    """
    config = PrefillConfig(block_m=128, block_n=64, warps=8, stages=2, source="pages")
    if invariant:
        return replace(config, fixed=invariant_tiles(config.block_n, max_model_len))
    return config


def _is_hopper(device: DeviceFacts) -> bool:
    return device.compute_capability is not None and device.compute_capability[0] == 9
