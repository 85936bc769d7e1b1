"""A step's rows and block lists, by one kernel."""

from __future__ import annotations

import triton
import triton.language as tl

FACTS = 7
"""Per row: position of its first query, sequence length, request, its first token in the step, its tokens, its last
masked block in the cache (or -1), and how far that lies from its place in the sequence, in tokens."""


@triton.jit
def fill_rows(
    table,
    table_stride,
    query_start,
    seq_lens,
    requests,
    whole,
    masked,
    row_stride,
    whole_counts,
    masked_counts,
    facts,
    facts_stride,
    unit_rows,
    places,
    units,
    rows,
    UNITS: tl.constexpr,
    LENGTH: tl.constexpr,
    IDENTITY: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    KERNEL_BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    ALL_MASKED: tl.constexpr,
    SPLIT: tl.constexpr,
    LEAST: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program a row: which unit's it is, its share of the unit's blocks, and their physical kernel blocks.

    A unit is the query tokens of one request. Its visited blocks are cut evenly into as many rows as the fixed
    number of rows allows: the cut follows the lengths of the moment, and the grid does not.
    """
    row = tl.program_id(0)
    unit = tl.arange(0, UNITS)
    live = unit < units
    if IDENTITY:  # noqa: SIM108
        request = unit
    else:
        request = tl.load(requests + unit, mask=live, other=0)
    token = tl.load(query_start + request, mask=live, other=0)
    count = tl.load(query_start + request + 1, mask=live, other=0) - token
    seq_len = tl.load(seq_lens + request, mask=live, other=0)
    queries = tl.where(seq_len > 0, count, 0)
    position = tl.maximum(seq_len - queries, 0)
    last = tl.maximum(position + queries - 1, 0)
    # Under batch invariance, the tile that a training pass would compute this query in decides which blocks count as
    # whole; else the tile is the unit, and the mask's blocks are the kernel's.
    EACH: tl.constexpr = KV_BLOCK // KERNEL_BLOCK
    tile = position // QUERY_BLOCK * QUERY_BLOCK
    tile_last = tile + QUERY_BLOCK - 1 if QUERY_BLOCK > 1 else last
    if CAUSAL:
        end_key = last
        whole_to = tile
    else:
        end_key = seq_len - 1
        whole_to = seq_len - 1
        if WINDOW > 0:
            end_key = tl.minimum(end_key, last + WINDOW - 1)
            whole_to = tl.minimum(whole_to, tile + WINDOW - 1)
    end = tl.where(queries > 0, end_key // KERNEL_BLOCK + 1, 0)
    tail = (whole_to + 1) // KV_BLOCK * EACH
    first = tl.zeros_like(end)
    full = tl.zeros_like(end)
    if WINDOW > 0:
        first = tl.minimum(tl.maximum(position - WINDOW + 1, 0) // KERNEL_BLOCK, end)
        full = (tl.maximum(tile_last - WINDOW + 1, 0) + KV_BLOCK - 1) // KV_BLOCK * EACH
        narrow = full > tail
        full = tl.where(narrow, end, tl.minimum(tl.maximum(full, first), end))
        tail = tl.where(narrow, end, tl.maximum(tail, first))
    tail = tl.minimum(tail, end)
    if ALL_MASKED:
        full = end
        tail = end
    blocks = end - first
    if SPLIT:
        # The smallest share whose rows suffice; the upper bound always does.
        total = tl.sum(blocks, 0)
        low = tl.maximum(tl.cdiv(total, rows), LEAST)
        share = tl.maximum(tl.cdiv(total, tl.maximum(rows - units, 1)), LEAST)
        for _ in range(10):
            middle = (low + share) // 2
            needed = tl.sum(tl.where(live, tl.maximum((blocks + middle - 1) // middle, 1), 0), 0)
            low = tl.where(needed <= rows, low, tl.minimum(middle + 1, share))
            share = tl.where(needed <= rows, middle, share)
        splits = tl.maximum((blocks + share - 1) // share, 1)
    else:
        splits = tl.full([UNITS], 1, tl.int32)
    splits = tl.where(live, splits, 0)
    ends = tl.cumsum(splits, 0)
    if row == 0:
        tl.store(unit_rows, 0)
        tl.store(unit_rows + unit + 1, ends, mask=live)

    mine = (ends > row) & (ends - splits <= row)
    split = tl.sum(tl.where(mine, row - (ends - splits), 0), 0)
    even = tl.sum(tl.where(mine, (blocks + splits - 1) // tl.maximum(splits, 1), 0), 0)
    my_request = tl.sum(tl.where(mine, request, 0), 0)
    my_end = tl.sum(tl.where(mine, end, 0), 0)
    start = tl.sum(tl.where(mine, first, 0), 0) + split * even
    stop = tl.minimum(start + even, my_end)
    whole_start = tl.maximum(start, tl.sum(tl.where(mine, full, 0), 0))
    whole_stop = tl.minimum(stop, tl.sum(tl.where(mine, tail, 0), 0))
    whole_count = tl.maximum(whole_stop - whole_start, 0)
    head = tl.maximum(tl.minimum(stop, tl.sum(tl.where(mine, full, 0), 0)) - start, 0)
    rest = tl.maximum(start, tl.sum(tl.where(mine, tail, 0), 0))
    masked_count = head + tl.maximum(stop - rest, 0)
    if ALL_MASKED:
        whole_count = 0
        head = 0
        rest = start
        masked_count = tl.maximum(stop - start, 0)

    tl.store(facts + row, tl.sum(tl.where(mine, position, 0), 0))
    tl.store(facts + facts_stride + row, tl.sum(tl.where(mine, seq_len, 0), 0))
    tl.store(facts + 2 * facts_stride + row, my_request)
    tl.store(facts + 3 * facts_stride + row, tl.sum(tl.where(mine, token, 0), 0))
    tl.store(facts + 4 * facts_stride + row, tl.sum(tl.where(mine, count, 0), 0))
    tl.store(whole_counts + row, whole_count)
    tl.store(masked_counts + row, masked_count)

    blocks_of = table + my_request.to(tl.int64) * table_stride
    ragged = tl.where(masked_count > head, rest + masked_count - head, start + head) - 1
    ragged_block = tl.load(blocks_of + ragged // PER_BLOCK, mask=masked_count > 0, other=0)
    lies = ragged_block * BLOCK_STRIDE + ragged % PER_BLOCK
    tl.store(facts + 5 * facts_stride + row, tl.where(masked_count > 0, lies, -1))
    tl.store(facts + 6 * facts_stride + row, tl.where(masked_count > 0, (lies - ragged) * KERNEL_BLOCK, 0))
    column = tl.arange(0, CHUNK)
    # One column past the last names the null block: the kernel looks one block ahead.
    for done in range(0, whole_count + 1, CHUNK):
        at = done + column
        place = whole_start + at
        inside = at < whole_count
        block = tl.load(blocks_of + place // PER_BLOCK, mask=inside, other=0)
        tl.store(places + block, place // PER_BLOCK, mask=inside)
        physical = tl.where(inside, block * BLOCK_STRIDE + place % PER_BLOCK, 0)
        tl.store(whole + row.to(tl.int64) * row_stride + at, physical, mask=at <= whole_count)
    for done in range(0, masked_count + 1, CHUNK):
        at = done + column
        place = tl.where(at < head, start + at, rest + at - head)
        inside = at < masked_count
        block = tl.load(blocks_of + place // PER_BLOCK, mask=inside, other=0)
        tl.store(places + block, place // PER_BLOCK, mask=inside)
        physical = tl.where(inside, block * BLOCK_STRIDE + place % PER_BLOCK, 0)
        tl.store(masked + row.to(tl.int64) * row_stride + at, physical, mask=at <= masked_count)
