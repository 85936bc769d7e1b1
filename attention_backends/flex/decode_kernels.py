"""Triton kernels around torch's: a step's rows and block lists, queries into rows, and splits into outputs."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

FACTS = 5
"""Per row: position of its first query, sequence length, request, its first token in the step, its tokens."""


@triton.jit
def fill_rows(
    table: Any,
    table_stride: Any,
    query_start: Any,
    seq_lens: Any,
    requests: Any,
    whole: Any,
    masked: Any,
    row_stride: Any,
    whole_counts: Any,
    masked_counts: Any,
    facts: Any,
    facts_stride: Any,
    unit_rows: Any,
    places: Any,
    units: Any,
    rows: Any,
    UNITS: tl.constexpr,
    LENGTH: tl.constexpr,
    IDENTITY: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    KERNEL_BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    ALIGN: tl.constexpr,
    ALL_MASKED: tl.constexpr,
    SPLIT: tl.constexpr,
    LEAST: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """One program a row: which unit's it is, its share of the unit's blocks, and their physical kernel blocks.

    A unit is the query tokens of one request. Its visited blocks are cut evenly into as many rows as the fixed
    number of rows allows: the cut follows the lengths of the moment, and the grid does not.
    """
    row = tl.program_id(0)
    unit = tl.arange(0, UNITS)
    live = unit < units
    if IDENTITY:
        request = unit
    else:
        request = tl.load(requests + unit, mask=live, other=0)
    token = tl.load(query_start + request, mask=live, other=0)
    count = tl.load(query_start + request + 1, mask=live, other=0) - token
    seq_len = tl.load(seq_lens + request, mask=live, other=0)
    queries = tl.where(seq_len > 0, count, 0)
    position = tl.maximum(seq_len - queries, 0)
    last = tl.maximum(position + queries - 1, 0)
    # The aligned tile that a training pass would compute this query in decides which blocks count as whole.
    tile = position // ALIGN * ALIGN
    tile_last = tile + ALIGN - 1 if ALIGN > 1 else last
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
    tail = tl.minimum(end, (whole_to + 1) // KERNEL_BLOCK)
    first = tl.zeros_like(end)
    full = tl.zeros_like(end)
    if WINDOW > 0:
        first = tl.minimum(tl.maximum(position - WINDOW + 1, 0) // KERNEL_BLOCK, end)
        full = (tl.maximum(tile_last - WINDOW + 1, 0) + KERNEL_BLOCK - 1) // KERNEL_BLOCK
        full = tl.maximum(full, first)
        narrow = full > tail
        full = tl.where(narrow, end, full)
        tail = tl.where(narrow, end, tail)
    if ALL_MASKED:
        full = end
        tail = end
    blocks = end - first
    if SPLIT:
        share = tl.maximum(tl.cdiv(tl.sum(blocks, 0), tl.maximum(rows - units, 1)), LEAST)
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


@triton.jit
def pack_rows(
    query: Any,
    token_stride: Any,
    head_stride: Any,
    facts: Any,
    facts_stride: Any,
    out: Any,
    row_stride: Any,
    kv_head_stride: Any,
    query_stride: Any,
    GROUP: tl.constexpr,
    LENGTH: tl.constexpr,
    QUERIES: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """(T, Hq, D) into (R, Hk, LENGTH * GROUP, D): a KV head's query heads become query rows; absent ones are zero."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    token = tl.load(facts + 3 * facts_stride + row).to(tl.int64)
    count = tl.load(facts + 4 * facts_stride + row)
    at = tl.arange(0, QUERIES)
    width = tl.arange(0, WIDTH)
    here = (at < count * GROUP)[:, None] & (width < SIZE)[None, :]
    source = (token + at // GROUP) * token_stride + (head * GROUP + at % GROUP) * head_stride
    values = tl.load(query + source[:, None] + width[None, :], mask=here, other=0.0)
    target = row.to(tl.int64) * row_stride + head * kv_head_stride + at * query_stride
    there = (at < LENGTH * GROUP)[:, None] & (width < SIZE)[None, :]
    tl.store(out + target[:, None] + width[None, :], values, mask=there)


@triton.jit
def unpack_rows(
    rows: Any,
    row_stride: Any,
    head_stride: Any,
    query_stride: Any,
    facts: Any,
    facts_stride: Any,
    out: Any,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """(R, Hq, L, Dv) into (T, Hq, Dv)."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    token = tl.load(facts + 3 * facts_stride + row).to(tl.int64)
    count = tl.load(facts + 4 * facts_stride + row)
    at = tl.arange(0, QUERIES)
    width = tl.arange(0, WIDTH)
    here = (at < count)[:, None] & (width < SIZE)[None, :]
    source = row.to(tl.int64) * row_stride + head * head_stride + at * query_stride
    values = tl.load(rows + source[:, None] + width[None, :], mask=here, other=0.0)
    target = ((token + at) * HEADS + head) * SIZE
    tl.store(out + target[:, None] + width[None, :], values, mask=here)


@triton.jit
def merge_rows(
    parts: Any,
    lse: Any,
    unit_rows: Any,
    facts: Any,
    facts_stride: Any,
    sinks: Any,
    out: Any,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    LENGTH: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    SINKS: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """Softmax over the splits of each unit: (R, Hk, LENGTH * GROUP, Dv) with log-sum-exps into (T, Hq, Dv)."""
    unit = tl.program_id(0) // LENGTH
    index = tl.program_id(0) % LENGTH
    head = tl.program_id(1)
    first = tl.load(unit_rows + unit)
    last = tl.load(unit_rows + unit + 1)
    if index < tl.load(facts + 4 * facts_stride + first):
        token = tl.load(facts + 3 * facts_stride + first).to(tl.int64) + index
        inner = (head // GROUP) * (LENGTH * GROUP) + index * GROUP + head % GROUP
        width = tl.arange(0, WIDTH)
        if SINKS:
            # A sink is one more logit with no value behind it.
            most = tl.zeros([1], tl.float32) + tl.load(sinks + head).to(tl.float32)
            total = tl.full([1], 1.0, tl.float32)
        else:
            most = tl.full([1], float("-inf"), tl.float32)
            total = tl.zeros([1], tl.float32)
        acc = tl.zeros([WIDTH], tl.float32)
        for row in range(first, last, STEP):
            at = row + tl.arange(0, STEP)
            part = at.to(tl.int64) * (KV_HEADS * LENGTH * GROUP) + inner
            log = tl.load(lse + part, mask=at < last, other=float("-inf"))
            new = tl.maximum(most, tl.max(log, 0))
            safe = tl.where(new == float("-inf"), 0.0, new)
            old = tl.exp(most - safe)
            weight = tl.exp(log - safe)
            values = tl.load(
                parts + part[:, None] * SIZE + width[None, :],
                mask=(weight > 0.0)[:, None] & (width < SIZE)[None, :],
                other=0.0,
            ).to(tl.float32)
            acc = acc * old + tl.sum(values * weight[:, None], 0)
            total = total * old + tl.sum(weight, 0)
            most = new
        acc = acc / tl.where(total == 0.0, 1.0, total)
        target = (token * (KV_HEADS * GROUP) + head) * SIZE + width
        tl.store(out + target, acc.to(out.dtype.element_ty), mask=width < SIZE)


@triton.jit
def gather_pages(
    source: Any,
    other: Any,
    block_stride: Any,
    token_stride: Any,
    head_stride: Any,
    other_block_stride: Any,
    other_token_stride: Any,
    other_head_stride: Any,
    table: Any,
    table_stride: Any,
    chunks: Any,
    num_chunks: Any,
    out: Any,
    other_out: Any,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    OTHER_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """K and V pages of some requests as one run of tokens (tokens, H, D); past a request's end the run is zero.

    ``chunks`` (3, num_chunks): the request of each CHUNK tokens, where in the request they start, and its length.
    """
    program = tl.program_id(0)
    head = tl.program_id(1)
    chunk = program // (CHUNK // TOKENS)
    request = tl.load(chunks + chunk).to(tl.int64)
    start = tl.load(chunks + num_chunks + chunk)
    length = tl.load(chunks + 2 * num_chunks + chunk)
    at = program % (CHUNK // TOKENS) * TOKENS + tl.arange(0, TOKENS)
    place = start + at
    inside = place < length
    block = tl.load(table + request * table_stride + place // BLOCK, mask=inside, other=0).to(tl.int64)
    run = (chunk.to(tl.int64) * CHUNK + at) * HEADS + head
    width = tl.arange(0, WIDTH)
    if tl.program_id(2) == 0:
        offset = block * block_stride + (place % BLOCK) * token_stride + head * head_stride
        here = inside[:, None] & (width < SIZE)[None, :]
        values = tl.load(source + offset[:, None] + width[None, :], mask=here, other=0.0)
        tl.store(out + (run * SIZE)[:, None] + width[None, :], values, mask=(width < SIZE)[None, :])
    else:
        offset = block * other_block_stride + (place % BLOCK) * other_token_stride + head * other_head_stride
        here = inside[:, None] & (width < OTHER_SIZE)[None, :]
        values = tl.load(other + offset[:, None] + width[None, :], mask=here, other=0.0)
        tl.store(other_out + (run * OTHER_SIZE)[:, None] + width[None, :], values, mask=(width < OTHER_SIZE)[None, :])
