"""Prefill: many query tokens a request, over pages or over K and V that were gathered from them."""

from __future__ import annotations

import triton
import triton.language as tl

from .parts import combined, finite, row_sums, soft_capped, with_sink

PAGES: tl.constexpr = tl.constexpr(0)
"""K and V are loaded from the pages, token by token."""
GATHERED: tl.constexpr = tl.constexpr(1)
"""K and V are loaded by tensor descriptors from copies in one piece."""
COPIES: tl.constexpr = tl.constexpr(2)
"""As GATHERED, by pointers."""


@triton.jit(do_not_specialize=["rows"])
def gather_kernel(
    k_ptr, v_ptr, k_out_ptr, v_out_ptr, table_ptr, seq_lens_ptr, query_start_ptr, base_ptr,
    sk_b, sk_t, sk_h, sv_b, sv_t, sv_h, st_r, rows,
    HK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TOKENS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Copy a request's tokens to rows ``base[r]:base[r + 1]`` of every head's ``rows``; zeros where none is seen."""
    r = tl.program_id(1)
    base = tl.load(base_ptr + r)
    room = tl.load(base_ptr + r + 1) - base
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    if tl.program_id(0) * TOKENS < room:
        length = tl.load(seq_lens_ptr + r)
        written = n < length
        if WINDOW > 0:  # what lies before the window may be another request's by now
            queries = tl.load(query_start_ptr + r + 1) - tl.load(query_start_ptr + r)
            written = written & (n > length - queries - WINDOW)
        ids = tl.load(table_ptr + r.to(tl.int64) * st_r + n // BLOCK_SIZE, mask=written, other=0).to(tl.int64)
        d = tl.arange(0, DP)
        dv = tl.arange(0, DVP)
        head = tl.program_id(2)
        at = k_ptr + (ids * sk_b + (n % BLOCK_SIZE) * sk_t + head * sk_h)[:, None] + d[None, :]
        k = tl.load(at, mask=written[:, None] & (d < D)[None, :], other=0.0)
        at = v_ptr + (ids * sv_b + (n % BLOCK_SIZE) * sv_t + head * sv_h)[:, None] + dv[None, :]
        v = tl.load(at, mask=written[:, None] & (dv < DV)[None, :], other=0.0)
        row = (head * rows + base + n).to(tl.int64)[:, None]
        inside = (n < room)[:, None]
        tl.store(k_out_ptr + row * DP + d[None, :], k.to(k_out_ptr.dtype.element_ty), mask=inside)
        tl.store(v_out_ptr + row * DVP + dv[None, :], v.to(v_out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_tile(
    ptr, desc, table, start, since, length, base, s_b, s_t,
    D: tl.constexpr, DP: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, SOURCE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Tokens ``start`` to ``start + BLOCK_N`` of K or V, (BLOCK_N, DP); with MASKED, zeros outside ``since:length``."""
    if SOURCE == GATHERED:
        x = desc.load([base + start, 0])
    elif SOURCE == COPIES:
        row = (base + start + tl.arange(0, BLOCK_N)).to(tl.int64) * DP
        x = tl.load(ptr + row[:, None] + tl.arange(0, DP)[None, :])
    else:
        n = start + tl.arange(0, BLOCK_N)
        d = tl.arange(0, DP)
        if BLOCK_SIZE % BLOCK_N == 0:
            block = tl.load(table + start // BLOCK_SIZE).to(tl.int64)
            at = ptr + block * s_b + ((start % BLOCK_SIZE + tl.arange(0, BLOCK_N)) * s_t)[:, None] + d[None, :]
        else:
            ids = tl.load(table + n // BLOCK_SIZE, mask=n < length, other=0).to(tl.int64)
            at = ptr + (ids * s_b + (n % BLOCK_SIZE) * s_t)[:, None] + d[None, :]
        if MASKED:
            x = tl.load(at, mask=((n >= since) & (n < length))[:, None] & (d < D)[None, :], other=0.0)
        elif D < DP:
            x = tl.load(at, mask=(d < D)[None, :], other=0.0)
        else:
            x = tl.load(at)
    return x


@triton.jit
def attend_tile(
    q, k, v, m, norm, acc, start, length, position, slope, scale, soft_cap,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr, ALIBI: tl.constexpr, MASKED: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over the keys ``start`` to ``start + BLOCK_N``; scores in units of log2(e)."""
    s = tl.dot(q, tl.trans(k.to(q.dtype)))
    n = start + tl.arange(0, BLOCK_N)
    plain: tl.constexpr = not SOFT_CAP and not ALIBI
    if SOFT_CAP:
        s = soft_capped(s * scale, soft_cap)
    elif ALIBI:
        s = s * scale
    if ALIBI:
        s += slope[:, None] * (n[None, :] - position[:, None])
    if MASKED:
        seen = n[None, :] < length  # the causal mask says it too, for rows that are not padding
        if CAUSAL:
            seen = n[None, :] <= position[:, None]
        if WINDOW > 0:
            seen = seen & (n[None, :] > position[:, None] - WINDOW)
            if not CAUSAL:
                seen = seen & (n[None, :] < position[:, None] + WINDOW)
        s = tl.where(seen, s, float("-inf"))
    factor = scale if plain else 1.0
    m_new = tl.maximum(m, tl.max(s, 1) * factor)
    m_sub = finite(m_new) if MASKED else m_new
    w = tl.exp2(s * factor - m_sub[:, None])
    alpha = tl.exp2(m - m_sub)
    sums = row_sums(w, BLOCK_M, BLOCK_N) if FIXED > 0 else tl.sum(w, 1)
    norm = norm * alpha + sums
    acc = tl.dot(w.to(q.dtype), v.to(q.dtype), acc * alpha[:, None])
    return m_new, norm, acc


@triton.jit(do_not_specialize=["gathered_rows"])
def prefill_kernel(
    out_ptr, lse_ptr, q_ptr, k_ptr, v_ptr, k_desc, v_desc, table_ptr, seq_lens_ptr, query_start_ptr, base_ptr,
    items_ptr, sinks_ptr, alibi_ptr, scale, soft_cap, v_scale, gathered_rows,
    sq_t, sq_h, sk_b, sk_t, sk_h, sv_b, sv_t, sv_h, st_r, so_t, so_h,
    HK: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SOURCE: tl.constexpr,
    STAGES: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, SINKS: tl.constexpr,
    ALIBI: tl.constexpr, LSE: tl.constexpr, FIXED: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Rows are (query token, query head of the KV head): BLOCK_M // G tokens. ``scale`` holds log2(e) and K's scale.

    ``items`` are (request, tile of query tokens), the longest first; a tile past its request's tokens does nothing, and
    a request without keys gets zeros. FIXED: KV tiles of a segment in the batch-invariant mode, which adds segments up
    as decode does; else 0.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    BLOCK_Q: tl.constexpr = BLOCK_M // G
    head = tl.program_id(0) % HK
    item = tl.program_id(0) // HK
    r = tl.load(items_ptr + item * 2)
    tile = tl.load(items_ptr + item * 2 + 1)
    length = tl.load(seq_lens_ptr + r)
    token = tl.load(query_start_ptr + r)
    queries = tl.load(query_start_ptr + r + 1) - token
    base = 0
    if (SOURCE == GATHERED) | (SOURCE == COPIES):
        base = head * gathered_rows + tl.load(base_ptr + r)
    row = tl.arange(0, BLOCK_M)
    g = row % G
    index = tile * BLOCK_Q + row // G
    rows = (row < BLOCK_Q * G) & (index < queries)
    d = tl.arange(0, DP)
    dv = tl.arange(0, DVP)
    q_row = (token + index).to(tl.int64) * sq_t + (head * G + g) * sq_h
    q = tl.load(q_ptr + q_row[:, None] + d[None, :], mask=rows[:, None] & (d < D)[None, :], other=0.0)
    if NARROW:  # as decode
        q = q.to(tl.float16)
    position = length - queries + index
    first = length - queries + tile * BLOCK_Q
    last = tl.minimum(first + BLOCK_Q, length) - 1
    slope = tl.zeros([BLOCK_M], tl.float32)
    if ALIBI:
        slope = tl.load(alibi_ptr + head * G + g).to(tl.float32) * LOG2E
    table = table_ptr + r.to(tl.int64) * st_r
    k_head = k_ptr
    v_head = v_ptr
    if SOURCE == PAGES:
        k_head += head.to(tl.int64) * sk_h
        v_head += head.to(tl.int64) * sv_h

    # Keys since:hi are seen by some row; those of full_from:full_to by every row, and need no mask.
    since = 0
    full_from = 0
    hi = length
    full_to = length
    if CAUSAL:
        hi = last + 1
        full_to = first + 1
    if WINDOW > 0:
        since = tl.maximum(first - WINDOW + 1, 0)
        full_from = tl.cdiv(tl.maximum(last - WINDOW + 1, 0), BLOCK_N) * BLOCK_N
        if not CAUSAL:
            hi = tl.minimum(length, last + WINDOW)
            full_to = tl.minimum(length, first + WINDOW)
    nothing = (length <= 0) | (tile * BLOCK_Q >= queries)
    since = tl.where(nothing, 0, since)
    hi = tl.where(nothing, 0, hi)
    full_to = tl.where(nothing, 0, full_to)
    lo = since // BLOCK_N * BLOCK_N
    full_to = full_to // BLOCK_N * BLOCK_N
    full_from = tl.minimum(full_from, full_to)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DVP], tl.float32)
    if FIXED > 0:  # every segment by itself, then added up in order, every tile masked: what decode computes
        SEGMENT: tl.constexpr = FIXED * BLOCK_N
        for segment in range(lo // SEGMENT * SEGMENT, hi, SEGMENT):
            m1 = tl.full([BLOCK_M], float("-inf"), tl.float32)
            norm1 = tl.zeros([BLOCK_M], tl.float32)
            acc1 = tl.zeros([BLOCK_M, DVP], tl.float32)
            end = tl.minimum(segment + SEGMENT, hi)
            for start in tl.range(tl.maximum(segment, lo), end, BLOCK_N, num_stages=STAGES):
                k = load_tile(k_head, k_desc, table, start, since, length, base, sk_b, sk_t, D, DP, BLOCK_SIZE,
                              BLOCK_N, SOURCE, True)  # fmt: skip
                v = load_tile(v_head, v_desc, table, start, since, length, base, sv_b, sv_t, DV, DVP, BLOCK_SIZE,
                              BLOCK_N, SOURCE, True)  # fmt: skip
                m1, norm1, acc1 = attend_tile(q, k, v, m1, norm1, acc1, start, length, position, slope, scale, soft_cap,
                                           BLOCK_M, BLOCK_N, CAUSAL, WINDOW, SOFT_CAP, ALIBI, True, FIXED)  # fmt: skip
            m, norm, acc = combined(m, norm, acc, m1, norm1, acc1)
    else:
        for start in tl.range(full_from, full_to, BLOCK_N, num_stages=STAGES):
            k = load_tile(k_head, k_desc, table, start, since, length, base, sk_b, sk_t, D, DP, BLOCK_SIZE,
                          BLOCK_N, SOURCE, False)  # fmt: skip
            v = load_tile(v_head, v_desc, table, start, since, length, base, sv_b, sv_t, DV, DVP, BLOCK_SIZE,
                          BLOCK_N, SOURCE, False)  # fmt: skip
            m, norm, acc = attend_tile(q, k, v, m, norm, acc, start, length, position, slope, scale, soft_cap,
                                    BLOCK_M, BLOCK_N, CAUSAL, WINDOW, SOFT_CAP, ALIBI, False, FIXED)  # fmt: skip
        leading = tl.maximum(full_from - lo, 0) // BLOCK_N
        for number in tl.range(0, leading + tl.cdiv(tl.maximum(hi - full_to, 0), BLOCK_N), num_stages=1):
            start = tl.where(number < leading, lo + number * BLOCK_N, full_to + (number - leading) * BLOCK_N)
            k = load_tile(k_head, k_desc, table, start, since, length, base, sk_b, sk_t, D, DP, BLOCK_SIZE,
                          BLOCK_N, SOURCE, True)  # fmt: skip
            v = load_tile(v_head, v_desc, table, start, since, length, base, sv_b, sv_t, DV, DVP, BLOCK_SIZE,
                          BLOCK_N, SOURCE, True)  # fmt: skip
            m, norm, acc = attend_tile(q, k, v, m, norm, acc, start, length, position, slope, scale, soft_cap,
                                    BLOCK_M, BLOCK_N, CAUSAL, WINDOW, SOFT_CAP, ALIBI, True, FIXED)  # fmt: skip
    if SINKS:
        sink = tl.load(sinks_ptr + head * G + g).to(tl.float32) * LOG2E
        m, norm, acc = with_sink(m, norm, acc, sink)
    o = acc * (v_scale / tl.where(norm == 0, 1.0, norm))[:, None]
    o_row = (token + index).to(tl.int64) * so_t + (head * G + g) * so_h
    tl.store(out_ptr + o_row[:, None] + dv[None, :], o.to(out_ptr.dtype.element_ty),
             mask=rows[:, None] & (dv < DV)[None, :])  # fmt: skip
    if LSE:
        tl.store(lse_ptr + (token + index) * (HK * G) + head * G + g, (m + tl.log2(norm)) / LOG2E, mask=rows)
