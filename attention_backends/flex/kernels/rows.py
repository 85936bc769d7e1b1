"""Queries into rows, rows into outputs, and splits into one."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pack_rows(
    query,
    token_stride,
    head_stride,
    facts,
    facts_stride,
    out,
    row_stride,
    kv_head_stride,
    query_stride,
    GROUP: tl.constexpr,
    LENGTH: tl.constexpr,
    QUERIES: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):
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
    rows,
    row_stride,
    head_stride,
    query_stride,
    facts,
    facts_stride,
    out,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):
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
    parts,
    lse,
    unit_rows,
    facts,
    facts_stride,
    sinks,
    out,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    LENGTH: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    SINKS: tl.constexpr,
    STEP: tl.constexpr,
):
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
