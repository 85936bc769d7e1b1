"""Configurations of the kernels as a pure table: device facts and shapes in, numbers out. No torch, no Triton.

Each entry says what was measured with it, on one H200 (Triton 3.6.0, bf16, graph replay, FlashAttention 3 in the same
run; benchmarks/LOG.md has what else was tried). ``makeready bench tune`` measures the table again.
"""

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
    """Programs that run at once on a compute unit."""
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
    """Rows of a tile: query tokens times query heads of a KV head."""
    block_n: int
    """KV tokens of one step of a program."""
    warps: int
    stages: int
    source: str
    """Where K and V are read: the ``pages``, or one piece: ``gathered`` (by descriptors) or ``copies``."""
    fixed: int = 0
    """KV tiles of a segment in the batch-invariant mode; 0 outside it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Configurations for head sizes up to a limit, on one kind of device."""

    device: str
    """``hopper``, or ``any`` other."""
    head_size: int
    """The largest head size, padded to a power of two."""
    decode: DecodeConfig
    """One query token a request."""
    few: DecodeConfig
    """A few query tokens a request."""
    narrow: DecodeConfig
    """K and V in one byte a number."""
    invariant: DecodeConfig
    """The batch-invariant mode; its tile is :attr:`invariant_prefill`'s ``block_n``, so that both add in one order."""
    prefill: PrefillConfig
    """Many query tokens a request: K and V are copied into one piece first."""
    context: PrefillConfig
    """The same after a long context."""
    pages: PrefillConfig
    """Fewer query tokens: not worth the copy."""
    invariant_prefill: PrefillConfig
    measured: str
    """What was measured with the entry; empty where it never ran."""


def _decode(tile: int, warps: int, stages: int, programs: int, *, swap: bool = False) -> DecodeConfig:
    return DecodeConfig(tile=tile, warps=warps, stages=stages, programs=programs, swap=swap)


def _prefill(block_m: int, block_n: int, warps: int, stages: int, source: str) -> PrefillConfig:
    return PrefillConfig(block_m=block_m, block_n=block_n, warps=warps, stages=stages, source=source)


TABLE: tuple[Entry, ...] = (
    Entry(
        device="hopper",
        head_size=64,
        decode=_decode(64, 2, 3, 4),
        few=_decode(64, 4, 3, 2),
        narrow=_decode(64, 2, 3, 4),
        invariant=_decode(64, 2, 4, 3),
        prefill=_prefill(64, 64, 4, 4, "gathered"),
        context=_prefill(64, 64, 4, 4, "gathered"),
        pages=_prefill(128, 128, 4, 2, "pages"),
        invariant_prefill=_prefill(64, 64, 4, 4, "gathered"),
        measured="decode 64 x 8k 32/8: 1.08 of FA3; prefill 1 x 8k: 446 TFLOP/s, 0.91 of FA3",
    ),
    Entry(
        device="hopper",
        head_size=128,
        decode=_decode(64, 4, 3, 2, swap=True),
        few=_decode(64, 4, 3, 2),
        narrow=_decode(64, 2, 4, 3),
        invariant=_decode(64, 4, 4, 2),
        prefill=_prefill(64, 64, 4, 3, "gathered"),
        context=_prefill(128, 128, 8, 3, "gathered"),
        pages=_prefill(64, 64, 4, 3, "pages"),
        invariant_prefill=_prefill(64, 64, 4, 3, "gathered"),
        measured="decode 64 x 4k 32/8: 1.02 of FA3, fp8 2.8 TB/s; prefill 1 x 8k: 549 TFLOP/s, 0.85; mixed 0.81",
    ),
    Entry(
        device="hopper",
        head_size=256,
        decode=_decode(64, 8, 3, 1),
        few=_decode(32, 4, 3, 1),
        narrow=_decode(64, 4, 3, 2),
        invariant=_decode(64, 8, 3, 1),
        prefill=_prefill(128, 64, 8, 2, "gathered"),
        context=_prefill(128, 64, 8, 2, "gathered"),
        pages=_prefill(128, 64, 8, 2, "pages"),
        invariant_prefill=_prefill(128, 64, 8, 2, "gathered"),
        measured="decode 32 x 8k 16/2: 1.02 of FA3; prefill 1 x 8k 16/2: 524 TFLOP/s, 0.74",
    ),
    Entry(
        device="any",
        head_size=128,
        decode=_decode(64, 4, 2, 2),
        few=_decode(32, 4, 2, 2),
        narrow=_decode(64, 4, 2, 2),
        invariant=_decode(32, 4, 2, 2),
        prefill=_prefill(64, 32, 4, 2, "copies"),
        context=_prefill(64, 32, 4, 2, "copies"),
        pages=_prefill(64, 32, 4, 2, "pages"),
        invariant_prefill=_prefill(64, 32, 4, 2, "copies"),
        measured="",
    ),
    Entry(
        device="any",
        head_size=256,
        decode=_decode(32, 4, 2, 1),
        few=_decode(16, 4, 2, 1),
        narrow=_decode(32, 4, 2, 1),
        invariant=_decode(32, 4, 2, 1),
        prefill=_prefill(32, 32, 4, 2, "copies"),
        context=_prefill(32, 32, 4, 2, "copies"),
        pages=_prefill(32, 32, 4, 2, "pages"),
        invariant_prefill=_prefill(32, 32, 4, 2, "copies"),
        measured="",
    ),
)
"""The first entry that fits counts. Entries for ``any`` device fit 99 KB of shared memory, and never ran."""

LATENT_HEADS = 32
"""Query heads of a program that attends over latents."""
SEGMENT = 4096
"""Tokens of a segment in the batch-invariant mode, for models of up to :data:`SEGMENTS` of them."""
SEGMENTS = 32
LONG_QUERIES = 128
"""Query tokens a request, on average, from which a copy of its K and V pays. H200, 8 requests after 8k, 32/8/128: with
64 tokens each 250 us from pages and 268 from a copy, with 256 each 783 and 690."""
LONG_CONTEXT = 4
"""Keys for each query token from which :attr:`Entry.context` is faster than :attr:`Entry.prefill`."""
MOST_HEADS = 32
"""Rows up to which :attr:`Entry.decode` serves: the query heads of a KV head. :attr:`Entry.few` serves more."""
FEW_ROWS = 64
"""Rows up to which a request is decode's. H200, 8 requests of 8 tokens after 8k, 32/8/128: 90 us, by prefill 212."""


def short_queries(group: int) -> int:
    """Most query tokens of a request that decode's kernel serves."""
    return max(1, FEW_ROWS // group)


def decode_config(
    device: DeviceFacts, *, head_size: int, rows: int, narrow: bool, invariant: bool, max_model_len: int
) -> DecodeConfig:
    """How decode runs.

    :param head_size: as padded to a power of two.
    :param rows: query tokens, at most, times query heads of a KV head.
    :param narrow: K and V are stored in one byte a number.
    """
    entry = _entry(device, head_size)
    if invariant:
        return replace(entry.invariant, fixed=invariant_tiles(entry.invariant.tile, max_model_len))
    if rows > MOST_HEADS:
        return entry.few
    return entry.narrow if narrow else entry.decode


def prefill_config(
    device: DeviceFacts, head_size: int, head_size_v: int, group: int, *, requests: int, queries: int, keys: int,
    block_size: int, causal: bool, narrow: bool, invariant: bool, max_model_len: int,
) -> PrefillConfig:  # fmt: skip
    """How prefill runs.

    :param requests: how many prefill in this step.
    :param queries: their query tokens.
    :param keys: their tokens in the cache.
    :param narrow: K and V are stored in one byte a number.
    """
    entry = _entry(device, max(head_size, head_size_v))
    in_place = queries < LONG_QUERIES * requests
    if invariant:
        config = entry.invariant_prefill
        config = replace(config, fixed=invariant_tiles(config.block_n, max_model_len))
        return replace(config, source="pages") if in_place else config
    copied = entry.context if keys >= LONG_CONTEXT * queries else entry.prefill
    config = entry.pages if in_place else copied
    return replace(config, block_m=max(config.block_m, 1 << (group - 1).bit_length()))


def invariant_rows(device: DeviceFacts, head_size: int) -> int:
    """Rows of a tile in the batch-invariant mode: the most query heads of a KV head that it serves.

    :param device: one that is only planned for and says nothing of itself gets what the best of its type has.
    """
    if device.device_type == "cuda" and device.compute_capability is None and not device.present:
        return max(_first(kind, head_size).invariant_prefill.block_m for kind in ("hopper", "any"))
    return _entry(device, head_size).invariant_prefill.block_m


def invariant_tiles(tile: int, max_model_len: int) -> int:
    """Tiles of a segment: a number that follows from the build alone, so that a request's sums do."""
    segment = SEGMENT
    while segment * SEGMENTS < max_model_len:
        segment *= 2
    return segment // tile


def _entry(device: DeviceFacts, head_size: int) -> Entry:
    capability = device.compute_capability
    return _first("hopper" if capability is not None and capability[0] == 9 else "any", head_size)


def _first(kind: str, head_size: int) -> Entry:
    return next(entry for entry in TABLE if entry.device == kind and head_size <= entry.head_size)
