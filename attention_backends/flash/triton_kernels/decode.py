"""Decode: a few query tokens a request, K and V in pages. Programs share the work out evenly, whatever the lengths are.

The KV tiles of all requests form one line; program ``p`` of a KV head takes its ``p``-th equal share. A request that
several programs share leaves partial sums; whoever comes last of them adds them up, in order, so that the result
does not depend on who that is. In the batch-invariant mode a request is cut at fixed positions instead, so that its
sums are the same whatever else is in the batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .parts import combined, finite, row_sums, soft_capped, with_sink


@triton.jit(do_not_specialize=["num_requests", "programs"])
def plan_kernel(
    seq_lens_ptr, query_start_ptr, starts_ptr, first_ptr, count_ptr, num_requests, programs,
    HK: tl.constexpr, FEWEST: tl.constexpr, QUERIES: tl.constexpr, WINDOW: tl.constexpr, UNIT: tl.constexpr,
    FIXED: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program, which makes the plan that decode follows.

    ``starts[r]``: units before request ``r``; ``starts[num_requests + 1]``: units of a share; ``first[p]``: what there
    is to know of the request in which share ``p`` begins. A unit is UNIT tokens. A request of FEWEST to QUERIES query
    tokens has at least one, so that its rows are written; any other has none. The counts of arrivals start at zero.
    """
    total = 0
    longest = 1
    count = 0
    tl.store(starts_ptr, 0)
    for base in range(0, num_requests, BLOCK_B):
        r = base + tl.arange(0, BLOCK_B)
        ok = r < num_requests
        length = tl.load(seq_lens_ptr + r, mask=ok, other=0)
        queries = tl.load(query_start_ptr + r + 1, mask=ok, other=0) - tl.load(query_start_ptr + r, mask=ok, other=0)
        units = tl.cdiv(length, UNIT)
        if WINDOW > 0:
            units -= tl.maximum(length - queries - WINDOW + 1, 0) // UNIT
        units = tl.where(ok & (queries >= FEWEST) & (queries <= QUERIES), tl.maximum(units, 1), 0)
        tl.store(starts_ptr + r + 1, total + tl.cumsum(units, 0), mask=ok)
        total += tl.sum(units, 0)
        longest = tl.maximum(longest, tl.max(units, 0))
        count += tl.sum((units > 0).to(tl.int32), 0)
        for head in range(HK):
            tl.store(count_ptr + r * HK + head, 0, mask=ok)
    if FIXED > 0:
        share = tl.maximum(tl.cdiv(total, programs), 1)
    else:
        # Half of the programs run at once. Requests of one length are not cut where there are enough of them: whoever
        # is done takes the next. Otherwise one share for each program that runs, a little larger if the longest
        # requests are whole shares then: fewer pieces to add up.
        share = tl.maximum(tl.cdiv(total * 2, programs), 1)
        whole = tl.cdiv(tl.cdiv(total, programs), longest) * longest
        part = tl.cdiv(longest, tl.maximum(longest // share, 1))
        alike = (share >= longest) & (total * 16 >= longest * count * 15)
        share = tl.where(alike, whole, tl.where((share < longest) & (part * 16 <= share * 17), part, share))
    tl.store(starts_ptr + num_requests + 1, share)
    tl.debug_barrier()
    for base_p in range(0, programs, BLOCK_P):
        p = base_p + tl.arange(0, BLOCK_P)
        found = tl.zeros([BLOCK_P], tl.int32)
        for base in range(0, num_requests, BLOCK_B):
            r = base + tl.arange(0, BLOCK_B)
            ends = tl.load(starts_ptr + r + 1, mask=r < num_requests, other=2147483647)
            found += tl.sum((ends[None, :] <= (p * share)[:, None]).to(tl.int32), 1)
        there = (p < programs) & (found < num_requests)
        token = tl.load(query_start_ptr + found, mask=there, other=0)
        facts = first_ptr + p * 8
        tl.store(facts, found, mask=there)
        tl.store(facts + 1, tl.load(starts_ptr + found, mask=there), mask=there)
        tl.store(facts + 2, tl.load(starts_ptr + found + 1, mask=there), mask=there)
        tl.store(facts + 3, tl.load(seq_lens_ptr + found, mask=there), mask=there)
        tl.store(facts + 4, token, mask=there)
        tl.store(facts + 5, tl.load(query_start_ptr + found + 1, mask=there) - token, mask=there)


@triton.jit(do_not_specialize=["num_requests"])
def decode_kernel(
    out_ptr, lse_ptr, q_ptr, k_ptr, v_ptr, table_ptr, seq_lens_ptr, query_start_ptr, sinks_ptr, alibi_ptr,
    starts_ptr, first_ptr, part_ptr, part_ml_ptr, count_ptr,
    num_requests, scale, soft_cap, v_scale,
    sq_t, sq_h, sk_b, sk_t, sk_h, sv_b, sv_t, sv_h, st_r, so_t, so_h,
    HK: tl.constexpr, G: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, SWAP: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, SINKS: tl.constexpr, ALIBI: tl.constexpr, LSE: tl.constexpr,
    FIXED: tl.constexpr, EVICT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Rows are (query token, query head of the KV head), ROWS of them. ``scale`` holds log2(e) and K's scale.

    FIXED: tiles of a segment in the batch-invariant mode, in which the unit of work is a segment; else 0.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    UNIT: tl.constexpr = TILE * FIXED if FIXED > 0 else TILE
    # One-byte numbers become float16 in one instruction, exactly; to bfloat16 they would go by way of float32.
    NARROW: tl.constexpr = k_ptr.dtype.element_ty.primitive_bitwidth == 8
    KIND: tl.constexpr = tl.float16 if NARROW else q_ptr.dtype.element_ty
    policy: tl.constexpr = "evict_first" if EVICT else ""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    head = tl.program_id(0) % HK
    p = tl.program_id(0) // HK
    total = tl.load(starts_ptr + num_requests)
    share = tl.load(starts_ptr + num_requests + 1)
    # All of these at once: every load that waits for another delays the first tile.
    facts = first_ptr + p * 8
    r = tl.load(facts)
    r_begin = tl.load(facts + 1)
    r_end = tl.load(facts + 2)
    length = tl.load(facts + 3)
    token = tl.load(facts + 4)
    queries = tl.load(facts + 5)
    begin = p * share
    end = tl.minimum(begin + share, total)
    row = tl.arange(0, ROWS)
    g = row % G
    d = tl.arange(0, DP)
    dv = tl.arange(0, DVP)
    k_head = k_ptr + head.to(tl.int64) * sk_h
    v_head = v_ptr + head.to(tl.int64) * sv_h
    t = begin
    while t < end:
        # The next request's numbers, long before they are needed.
        more = r + 1 < num_requests
        next_end = tl.load(starts_ptr + r + 2)
        next_length = tl.load(seq_lens_ptr + r + 1, mask=more, other=0)
        next_token = tl.load(query_start_ptr + r + 1)
        next_token_end = tl.load(query_start_ptr + r + 2, mask=more, other=0)
        t_end = tl.minimum(end, r_end)
        if FIXED > 0:
            t_end = tl.minimum(t_end, t + 1)
        if t_end > t:
            index = row // G
            rows = index < queries
            q_row = (token + index).to(tl.int64) * sq_t + (head * G + g) * sq_h
            q = tl.load(q_ptr + q_row[:, None] + d[None, :], mask=rows[:, None] & (d < D)[None, :], other=0.0).to(KIND)
            position = length - queries + index
            first_seen = 0
            if WINDOW > 0:
                first_seen = tl.maximum(length - queries - WINDOW + 1, 0)
            unit0 = first_seen // UNIT
            lo = (unit0 + t - r_begin) * UNIT
            hi = tl.minimum((unit0 + t_end - r_begin) * UNIT, tl.cdiv(length, TILE) * TILE)
            if ALIBI:
                slope = tl.load(alibi_ptr + head * G + g).to(tl.float32) * LOG2E
            table = table_ptr + r.to(tl.int64) * st_r
            m = tl.full([ROWS], float("-inf"), tl.float32)
            norm = tl.zeros([ROWS], tl.float32)
            # Weights are added up key by key, and over the keys of a tile only once, at the end.
            spread = tl.zeros([TILE, ROWS] if SWAP else [ROWS, TILE], tl.float32)
            acc = tl.zeros([DVP, ROWS] if SWAP else [ROWS, DVP], tl.float32)
            ahead = lo + tl.arange(0, TILE)
            ids = tl.load(table + ahead // BLOCK_SIZE, mask=ahead < length, other=0)
            for start in tl.range(lo, hi, TILE, num_stages=STAGES):
                n = start + tl.arange(0, TILE)
                written = n < length
                if WINDOW > 0:  # what lies before the window may be another request's by now
                    written = written & (n >= first_seen)
                k_row = ids.to(tl.int64) * sk_b + (n % BLOCK_SIZE) * sk_t
                v_row = ids.to(tl.int64) * sv_b + (n % BLOCK_SIZE) * sv_t
                # The next tile's block ids: were they loaded where they are used, K and V would wait for them.
                ahead = n + TILE
                ids = tl.load(table + ahead // BLOCK_SIZE, mask=ahead < length, other=0)
                k = tl.load(k_head + k_row[:, None] + d[None, :], mask=written[:, None] & (d < D)[None, :], other=0.0,
                            eviction_policy=policy)  # fmt: skip
                v = tl.load(v_head + v_row[:, None] + dv[None, :], mask=written[:, None] & (dv < DV)[None, :],
                            other=0.0, eviction_policy=policy)  # fmt: skip
                # As attend_tile of prefill.py, so that both round alike.
                factor = scale
                if SWAP:  # keys are the rows of the matrix product, which fills it: queries are few
                    s = tl.dot(k.to(KIND), tl.trans(q))
                    distance = n[:, None] - position[None, :]
                    if ALIBI:
                        bias = slope[None, :] * distance
                else:
                    s = tl.dot(q, tl.trans(k.to(KIND)))
                    distance = n[None, :] - position[:, None]
                    if ALIBI:
                        bias = slope[:, None] * distance
                if SOFT_CAP:
                    s = soft_capped(s * scale, soft_cap)
                    factor = 1.0
                elif ALIBI:
                    s = s * scale
                    factor = 1.0
                if ALIBI:
                    s += bias
                if QUERIES > 1 or WINDOW > 0:
                    seen = distance <= 0
                    if WINDOW > 0:
                        seen = seen & (distance > -WINDOW)
                elif SWAP:
                    seen = written[:, None]
                else:
                    seen = written[None, :]
                s = tl.where(seen, s, float("-inf"))
                if SWAP:
                    m_new = tl.maximum(m, tl.max(s, 0) * factor)
                    w = tl.exp2(s * factor - finite(m_new)[None, :])
                    alpha = tl.exp2(m - finite(m_new))
                    if FIXED > 0:
                        norm = norm * alpha + row_sums(tl.trans(w), ROWS, TILE)
                    else:
                        spread = spread * alpha[None, :] + w
                    acc = tl.dot(tl.trans(v.to(KIND)), w.to(KIND), acc * alpha[None, :])
                else:
                    m_new = tl.maximum(m, tl.max(s, 1) * factor)
                    w = tl.exp2(s * factor - finite(m_new)[:, None])
                    alpha = tl.exp2(m - finite(m_new))
                    if FIXED > 0:
                        norm = norm * alpha + row_sums(w, ROWS, TILE)
                    else:
                        spread = spread * alpha[:, None] + w
                    acc = tl.dot(w.to(KIND), v.to(KIND), acc * alpha[:, None])
                m = m_new
            if FIXED == 0:
                norm = tl.sum(spread, 0 if SWAP else 1)
            if SWAP:
                acc = tl.trans(acc)
            done = (t == r_begin) & (t_end == r_end)
            if not done:
                if FIXED > 0:
                    slot = t * HK + head
                    p0 = r_begin
                    p1 = r_end - 1
                else:
                    # This program's first piece goes into its slot 0, a later (necessarily its last) one into slot 1.
                    slot = (p * 2 + (t != begin).to(tl.int32)) * HK + head
                    p0 = r_begin // share
                    p1 = (r_end - 1) // share
                at = row[:, None] * DVP + dv[None, :]
                tl.store(part_ptr + slot.to(tl.int64) * (ROWS * DVP) + at, acc)
                tl.store(part_ml_ptr + slot.to(tl.int64) * (2 * ROWS) + row, m)
                tl.store(part_ml_ptr + slot.to(tl.int64) * (2 * ROWS) + ROWS + row, norm)
                tl.debug_barrier()  # all of the program's stores come before its arrival
                arrived = tl.atomic_add(count_ptr + r * HK + head, 1, sem="acq_rel")
                done = arrived == p1 - p0
                if done:
                    tl.store(count_ptr + r * HK + head, 0)  # as the next launch expects it
                    m = tl.full([ROWS], float("-inf"), tl.float32)
                    norm = tl.zeros([ROWS], tl.float32)
                    acc = tl.zeros([ROWS, DVP], tl.float32)
                    for other in tl.range(p0, p1 + 1, loop_unroll_factor=4):
                        if FIXED > 0:
                            slot = other * HK + head
                        else:
                            slot = (other * 2 + (other * share < r_begin).to(tl.int32)) * HK + head
                        ml = part_ml_ptr + slot.to(tl.int64) * (2 * ROWS) + row
                        m1 = tl.load(ml, cache_modifier=".cg")
                        norm1 = tl.load(ml + ROWS, cache_modifier=".cg")
                        acc1 = tl.load(part_ptr + slot.to(tl.int64) * (ROWS * DVP) + at, cache_modifier=".cg")
                        m, norm, acc = combined(m, norm, acc, m1, norm1, acc1)
            if done:
                if SINKS:
                    sink = tl.load(sinks_ptr + head * G + g).to(tl.float32) * LOG2E
                    m, norm, acc = with_sink(m, norm, acc, sink)
                o = acc * (v_scale / tl.where(norm == 0, 1.0, norm))[:, None]
                o_row = (token + index).to(tl.int64) * so_t + (head * G + g) * so_h
                tl.store(out_ptr + o_row[:, None] + dv[None, :], o.to(out_ptr.dtype.element_ty),
                         mask=rows[:, None] & (dv < DV)[None, :])  # fmt: skip
                if LSE:
                    tl.store(
                        lse_ptr + (token + index) * (HK * G) + head * G + g, (m + tl.log2(norm)) / LOG2E, mask=rows
                    )
        t = tl.maximum(t_end, t)
        if t >= r_end:
            r += 1
            r_begin = r_end
            r_end = next_end
            length = next_length
            token = next_token
            queries = next_token_end - next_token
