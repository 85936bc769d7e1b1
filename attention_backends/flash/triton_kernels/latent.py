"""Attention over stored latents (MLA): one key and value for all query heads, read once for both.

A key is a latent and its rotary part, a value the latent itself, so that a tile of latents serves both products.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .parts import combined, finite


@triton.jit(do_not_specialize=["splits"])
def latent_kernel(
    out_ptr, part_ptr, sums_ptr, q_ptr, latent_ptr, rope_ptr, table_ptr, seq_lens_ptr, query_start_ptr, items_ptr,
    scale, splits, sq_t, sq_h, sl_b, sl_t, sr_b, sr_t, st_r,
    HEADS: tl.constexpr, OF_PROGRAM: tl.constexpr, TOKENS: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    P: tl.constexpr, PP: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    ITEMS: tl.constexpr, SPLIT: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows are (query token, query head), TOKENS of a request and OF_PROGRAM heads. ``scale`` holds log2(e).

    ITEMS: ``items`` are (request, tile of query tokens) of requests with several; else program ``r`` serves request
    ``r`` if that has one. SPLIT: keys are shared out to ``splits`` programs, which leave sums in ``part`` and ``sums``.
    """
    parts: tl.constexpr = (HEADS + OF_PROGRAM - 1) // OF_PROGRAM
    item = tl.program_id(0) // parts
    split = tl.program_id(1)
    r = item
    tile = 0
    if ITEMS:
        r = tl.load(items_ptr + item * 2)
        tile = tl.load(items_ptr + item * 2 + 1)
    length = tl.load(seq_lens_ptr + r)
    token = tl.load(query_start_ptr + r)
    queries = tl.load(query_start_ptr + r + 1) - token
    mine = tile * TOKENS < queries
    if not ITEMS:
        mine = queries == 1
    row = tl.arange(0, OF_PROGRAM * TOKENS)
    head = tl.program_id(0) % parts * OF_PROGRAM + row % OF_PROGRAM
    index = tile * TOKENS + row // OF_PROGRAM
    rows = (head < HEADS) & (index < queries) & mine
    c = tl.arange(0, RP)
    p = tl.arange(0, PP)
    at = q_ptr + (token + index).to(tl.int64)[:, None] * sq_t + head[:, None] * sq_h
    q = tl.load(at + c[None, :], mask=rows[:, None] & (c < R)[None, :], other=0.0).to(OPERAND)
    q_rope = tl.load(at + R + p[None, :], mask=rows[:, None] & (p < P)[None, :], other=0.0).to(OPERAND)
    position = length - queries + index
    hi = tl.where(mine, tl.minimum(length - queries + (tile + 1) * TOKENS, length), 0)
    lo = 0
    if SPLIT:
        share = tl.cdiv(tl.cdiv(hi, TILE), splits) * TILE
        lo = split * share
        hi = tl.minimum(hi, lo + share)
    table = table_ptr + r.to(tl.int64) * st_r
    m = tl.full([OF_PROGRAM * TOKENS], float("-inf"), tl.float32)
    norm = tl.zeros([OF_PROGRAM * TOKENS], tl.float32)
    acc = tl.zeros([OF_PROGRAM * TOKENS, RP], tl.float32)
    for start in tl.range(lo, hi, TILE, num_stages=STAGES):
        n = start + tl.arange(0, TILE)
        written = n < hi
        ids = tl.load(table + n // BLOCK_SIZE, mask=written, other=0).to(tl.int64)
        latent_at = latent_ptr + (ids * sl_b + (n % BLOCK_SIZE) * sl_t)[:, None] + c[None, :]
        latent = tl.load(latent_at, mask=written[:, None] & (c < R)[None, :], other=0.0).to(OPERAND)
        rope_at = rope_ptr + (ids * sr_b + (n % BLOCK_SIZE) * sr_t)[:, None] + p[None, :]
        rope = tl.load(rope_at, mask=written[:, None] & (p < P)[None, :], other=0.0).to(OPERAND)
        s = tl.dot(q, tl.trans(latent), input_precision=PRECISION)
        s = tl.dot(q_rope, tl.trans(rope), acc=s, input_precision=PRECISION)
        s = tl.where((n[None, :] <= position[:, None]) & written[None, :], s * scale, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        w = tl.exp2(s - finite(m_new)[:, None])
        alpha = tl.exp2(m - finite(m_new))
        norm = norm * alpha + tl.sum(w, 1)
        acc = tl.dot(w.to(OPERAND), latent, acc=acc * alpha[:, None], input_precision=PRECISION)
        m = m_new
    if SPLIT:
        place = (split * (tl.num_programs(0) // parts) + r).to(tl.int64) * HEADS + head
        tl.store(part_ptr + place[:, None] * RP + c[None, :], acc, mask=rows[:, None])
        tl.store(sums_ptr + place * 2, m, mask=rows)
        tl.store(sums_ptr + place * 2 + 1, norm, mask=rows)
    else:
        o = acc / tl.where(norm == 0, 1.0, norm)[:, None]
        o_row = (token + index).to(tl.int64) * HEADS + head
        tl.store(out_ptr + o_row[:, None] * R + c[None, :], o.to(out_ptr.dtype.element_ty),
                 mask=rows[:, None] & (c < R)[None, :])  # fmt: skip


@triton.jit(do_not_specialize=["splits"])
def latent_sum_kernel(
    out_ptr, part_ptr, sums_ptr, query_start_ptr, splits,
    HEADS: tl.constexpr, OF_PROGRAM: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """Add up what the programs of one request with one query token left, in order, for OF_PROGRAM heads."""
    r = tl.program_id(0)
    token = tl.load(query_start_ptr + r)
    if tl.load(query_start_ptr + r + 1) - token == 1:
        head = tl.program_id(1) * OF_PROGRAM + tl.arange(0, OF_PROGRAM)
        rows = head < HEADS
        c = tl.arange(0, RP)
        m = tl.full([OF_PROGRAM], float("-inf"), tl.float32)
        norm = tl.zeros([OF_PROGRAM], tl.float32)
        acc = tl.zeros([OF_PROGRAM, RP], tl.float32)
        for split in range(splits):
            place = (split * tl.num_programs(0) + r).to(tl.int64) * HEADS + head
            m1 = tl.load(sums_ptr + place * 2, mask=rows, other=float("-inf"))
            norm1 = tl.load(sums_ptr + place * 2 + 1, mask=rows, other=0.0)
            acc1 = tl.load(part_ptr + place[:, None] * RP + c[None, :], mask=rows[:, None], other=0.0)
            m, norm, acc = combined(m, norm, acc, m1, norm1, acc1)
        o = acc / tl.where(norm == 0, 1.0, norm)[:, None]
        o_row = token.to(tl.int64) * HEADS + head
        tl.store(out_ptr + o_row[:, None] * R + c[None, :], o.to(out_ptr.dtype.element_ty),
                 mask=rows[:, None] & (c < R)[None, :])  # fmt: skip
