"""Prefill on Hopper: one warp group loads by tensor descriptors, two compute; one query head a program."""

from __future__ import annotations

import triton
import triton.language as tl

from .parts import finite, soft_capped, with_sink
from .prefill import GATHERED


@triton.jit(do_not_specialize=["gathered_rows"])
def prefill_ws_kernel(  # noqa: ANN201
    out_ptr, lse_ptr, q_desc, k_desc, v_desc, table_ptr, seq_lens_ptr, query_start_ptr, base_ptr, items_ptr,
    sinks_ptr, alibi_ptr, scale, soft_cap, v_scale, gathered_rows, st_r, so_t, so_h,
    HQ: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SOURCE: tl.constexpr,
    STAGES: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, SINKS: tl.constexpr, ALIBI: tl.constexpr,
    LSE: tl.constexpr,
):  # fmt: skip
    """As :func:`~.prefill.prefill_kernel`, causal. One loop, every tile masked: the compiler splits only one loop."""
    LOG2E: tl.constexpr = 1.4426950408889634
    head = tl.program_id(0) % HQ
    item = tl.program_id(0) // HQ
    r = tl.load(items_ptr + item * 2)
    tile = tl.load(items_ptr + item * 2 + 1)
    length = tl.load(seq_lens_ptr + r)
    token = tl.load(query_start_ptr + r)
    queries = tl.load(query_start_ptr + r + 1) - token
    kv_head = head // G
    base = kv_head * gathered_rows
    if SOURCE == GATHERED:
        base += tl.load(base_ptr + r)
    dv = tl.arange(0, DV)
    index = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    position = length - queries + index
    first = length - queries + tile * BLOCK_M
    q = q_desc.load([token + tile * BLOCK_M, head * D])
    table = table_ptr + r.to(tl.int64) * st_r
    lo = 0
    if WINDOW > 0:
        lo = tl.maximum(first - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    hi = tl.minimum(first + BLOCK_M, length)
    if ALIBI:
        slope = tl.load(alibi_ptr + head).to(tl.float32) * LOG2E
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
    acc = tl.zeros([BLOCK_M, DV], tl.float32)
    for start in tl.range(lo, hi, BLOCK_N, num_stages=STAGES, warp_specialize=True):
        if SOURCE == GATHERED:
            k = k_desc.load([base + start, 0])
        else:
            block = tl.load(table + start // BLOCK_SIZE)
            k = k_desc.load([block, kv_head, start % BLOCK_SIZE, 0]).reshape([BLOCK_N, D])
        s = tl.dot(q, tl.trans(k))
        n = start + tl.arange(0, BLOCK_N)
        factor = scale
        if SOFT_CAP:
            s = soft_capped(s * scale, soft_cap)
            factor = 1.0
        if ALIBI:
            s = s * factor + slope * (n[None, :] - position[:, None])
            factor = 1.0
        seen = n[None, :] <= position[:, None]
        if WINDOW > 0:
            seen = seen & (n[None, :] > position[:, None] - WINDOW)
        s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * factor)
        m_sub = m_new
        if WINDOW > 0:
            m_sub = finite(m_new)
        w = tl.exp2(s * factor - m_sub[:, None])
        alpha = tl.exp2(m - m_sub)
        l = l * alpha + tl.sum(w, 1)  # noqa: E741
        acc = acc * alpha[:, None]
        m = m_new
        if SOURCE == GATHERED:
            v = v_desc.load([base + start, 0])
        else:
            v = v_desc.load([block, kv_head, start % BLOCK_SIZE, 0]).reshape([BLOCK_N, DV])
        acc = tl.dot(w.to(q.dtype), v, acc)
    if SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        m, l, acc = with_sink(m, l, acc, sink)  # noqa: E741
    o = acc * (v_scale / tl.where(l == 0, 1.0, l))[:, None]
    o_row = (token + index).to(tl.int64) * so_t + head * so_h
    tl.store(out_ptr + o_row[:, None] + dv[None, :], o.to(out_ptr.dtype.element_ty), mask=(index < queries)[:, None])
    if LSE:
        tl.store(lse_ptr + (token + index) * HQ + head, (m + tl.log2(l)) / LOG2E, mask=index < queries)
