"""Kernel tiles by shape: plain numbers with the measurement beside each. No torch.

Measured on one H200 (torch 2.11.0, triton 3.6.0, bfloat16, 2026-11-21, benchmarks/LOG.md section "flex").
"""

from __future__ import annotations

from dataclasses import dataclass

ORDINARY_QUERY_BLOCK = 128
FEWEST_ROWS = 2
"""A batch of one row would be compiled apart from all other sizes."""
INVARIANT_ROWS = 64
"""Query rows of the one tile under batch invariance."""
TILE_BYTES = 16384
"""Of K or V in one iteration: three of each, and the queries, fit in shared memory for every head size."""
MANY_PROGRAMS = 512
"""From here on decoding needs no splits to fill 132 multiprocessors."""
LONGEST_ROW_BYTES = 4 << 20
"""K and V that one program may read alone: about 0.2 ms. Above, long requests are split whatever the batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """What one program of a kernel works on, and how."""

    block_m: int
    """Query rows."""
    block_n: int
    """Keys of one iteration."""
    warps: int
    stages: int
    tma: bool = False
    prescale: bool = False
    """Scale the queries, in their own dtype, instead of the scores: less arithmetic a score, one rounding more."""
    programs: int = 0
    """Decoding: programs to aim for when requests are split."""


def key_columns(head_size: int, element_bytes: int, kernel_block: int) -> int:
    """Keys of one iteration: the kernel block, as far as :data:`TILE_BYTES` allow."""
    columns = TILE_BYTES // (_power_of_two(head_size) * element_bytes)
    return min(kernel_block, max(16, columns))


def one_wave(programs: int, multiprocessors: int, head_size: int) -> bool:
    """Whether unsplit requests fill the device once, one program a multiprocessor."""
    return head_size <= 128 and 0.7 * multiprocessors <= programs <= multiprocessors


def decode_tile(
    head_size: int, element_bytes: int, kernel_block: int, *, split: bool = True, wave: bool = False
) -> Tile:
    """The tile of single query tokens, whose query heads of one KV head are the rows.

    :param split: whether requests are split, or each is one program a KV head.
    :param wave: whether those programs are about one a multiprocessor.
    """
    columns = key_columns(head_size, element_bytes, kernel_block)
    if wave and not split and columns > 16:
        # 64 x 8k, 32/2/128, 128 programs: block 64 127 us (FA3 129), block 2112 as 33 x 64 125 (127).
        return Tile(block_m=64, block_n=columns, warps=4, stages=4)
    if columns == 16:
        # 64 x 4k, 32/8/128, block 16: 248 us (FA3 249); 256 x 1k: 246 (274); 1 x 128k in 66 splits: 134 (133).
        return Tile(block_m=16, block_n=16, warps=2, stages=3, programs=528)
    if not split:
        # 64 x 4k, 32/8/128, block 64, 512 programs: 240 us (FA3 247). Three stages: fewer programs a multiprocessor.
        return Tile(block_m=16, block_n=columns, warps=4, stages=2)
    if head_size > 128:
        # 32 x 8k, 16/2/256, block 544 as 17 x 32, 256 programs: 131 us (FA3 131); unsplit 233.
        return Tile(block_m=16, block_n=columns, warps=4, stages=3, programs=256)
    # 64 x 8k, 32/2/128, 256 programs: block 64 131 us (FA3 129), block 2112 as 33 x 64 131 (127); unsplit 129.
    return Tile(block_m=16, block_n=columns, warps=2, stages=3, programs=256)


def invariant_tile(
    head_size: int = 128, element_bytes: int = 2, kernel_block: int = 64, *, prefill: bool = False
) -> Tile:
    """The one tile of every query under batch invariance, decode and prefill alike; never split.

    Stages and TMA move data and change no bits. Against the ordinary tile: 64 x 4k, 32/8/128: block 16 267 us (248),
    block 64 247 (240; 276 with TMA, when two programs no longer fit a multiprocessor); 64 x 8k, 32/2/128, block 64 131
    (126), block 2112 130 (123). Tiles of 16 x 16 take 2.3 times as long for 64 x 8k, and 6 ms instead of 1.2 for a
    prefill of 8k. 32 x 8k, 16/2/256 takes 193 with TMA, 230 without. Prefill 4 x 4k, block 64: 1483 us with two stages
    and TMA, 1965 with three.
    """
    columns = key_columns(head_size, element_bytes, min(kernel_block, 64))
    full = columns * _power_of_two(head_size) * element_bytes >= TILE_BYTES
    if prefill:
        return Tile(block_m=INVARIANT_ROWS, block_n=columns, warps=4, stages=2 if full else 3, tma=True)
    return Tile(block_m=INVARIANT_ROWS, block_n=columns, warps=4, stages=3, tma=columns < 64)


def prefill_tile(head_size: int, element_bytes: int) -> Tile:
    """The tile of long queries over K and V that lie in one run.

    Kernel alone, 32/8/128: 1 x 8k 1044 us (FA3 866), 4 x 4k 1104 (947), 2k at 16k 899 (716); 128 x 128 with 8 warps
    1273, 1367 and 1054; scaling scores instead of queries 1164, 1237 and 1065; two stages 1162; without TMA 1280 (4 x
    4k). Longest rows first: 1028, 1135 and 893, which a copy of the queries costs again.
    """
    return Tile(
        block_m=64, block_n=key_columns(head_size, element_bytes, 64), warps=4, stages=3, tma=True,
        prescale=element_bytes == 2,
    )  # fmt: skip


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
