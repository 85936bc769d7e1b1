"""Mamba 2: one step per decode, and four kernels for longer requests, cut into chunks of L tokens.

``decays`` prepares time steps and ``pairs`` the products of C and B, which all heads of a group share; ``states`` walks
each request with a tile of its state in registers and leaves the state before every chunk; ``outputs`` then computes
all chunks at once.
"""

import triton
import triton.language as tl

from .numerics import chunk_at, silu, time_step


@triton.jit
def mamba2_step(
    x, dt, A, B, C, D, dt_bias, z, state, out, slots, fresh, query_start,
    width, size, low, high, decode_low, decode_high,
    x_t, x_h, dt_t, B_t, B_g, C_t, C_g, D_h, D_p, z_t, z_h, state_s, state_h, state_p, state_n, out_t, out_h,
    HEADS_PER_GROUP: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_Z: tl.constexpr,
    SOFTPLUS: tl.constexpr, PACKED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One token of one request, one head, BLOCK_P rows of its state."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    head = tl.program_id(1)
    request = tl.program_id(2)
    token = request
    if not PACKED:
        token = tl.load(query_start + request)
        if tl.load(query_start + request + 1) - token != 1:
            return
    token = token.to(tl.int64)
    slot = tl.load(slots + request).to(tl.int64)
    rows = p < width
    target = out + token * out_t + head * out_h + p
    if slot < 0:
        tl.store(target, tl.zeros((BLOCK_P,), out.dtype.element_ty), mask=rows)
        return
    known = tl.load(fresh + request) == 0
    n = tl.arange(0, BLOCK_N)
    columns = n < size
    inside = rows[:, None] & columns[None, :]
    page = state + slot * state_s + head * state_h + p[:, None] * state_p + n[None, :] * state_n
    s = tl.load(page, mask=inside & known, other=0.0).to(tl.float32)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(dt_bias + head).to(tl.float32)
    low = tl.where(known, decode_low, low)
    high = tl.where(known, decode_high, high)
    step = time_step(tl.load(dt + token * dt_t + head).to(tl.float32), bias, low, high, SOFTPLUS)
    decay = tl.exp(step * tl.load(A + head).to(tl.float32))
    group = head // HEADS_PER_GROUP
    values = tl.load(x + token * x_t + head * x_h + p, mask=rows, other=0.0).to(tl.float32)
    b = tl.load(B + token * B_t + group * B_g + n, mask=columns, other=0.0).to(tl.float32)
    c = tl.load(C + token * C_t + group * C_g + n, mask=columns, other=0.0).to(tl.float32)
    s = s * decay + (values * step)[:, None] * b[None, :]
    tl.store(page, s.to(state.dtype.element_ty), mask=inside)
    y = tl.sum(s * c[None, :], 1)
    if HAS_D:
        y += values * tl.load(D + head * D_h + p * D_p, mask=rows, other=0.0).to(tl.float32)
    if HAS_Z:
        y *= silu(tl.load(z + token * z_t + head * z_h + p, mask=rows, other=0.0).to(tl.float32))
    tl.store(target, y.to(out.dtype.element_ty), mask=rows)


@triton.jit(do_not_specialize=["tokens"])
def mamba2_decays(
    dt, A, dt_bias, steps, totals, chunks,
    heads, tokens, low, high, dt_t,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Time steps of one chunk, and their decays (in powers of two) summed from the chunk's first token: (H, T) each."""
    _, _, start, left = chunk_at(chunks, tl.program_id(0))
    if left <= 0:
        return
    i = tl.arange(0, BLOCK_L)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = (h < heads)[None, :] & (i < left)[:, None]
    raw = tl.load(dt + (start + i)[:, None] * dt_t + h[None, :], mask=inside, other=0.0).to(tl.float32)
    bias = tl.zeros((BLOCK_H,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(dt_bias + h, mask=h < heads, other=0.0).to(tl.float32)
    step = tl.where(inside, time_step(raw, bias[None, :], low, high, SOFTPLUS), 0.0)
    a = tl.load(A + h, mask=h < heads, other=0.0).to(tl.float32) * 1.4426950408889634
    total = tl.cumsum(step * a[None, :], 0)
    where = h[None, :].to(tl.int64) * tokens + (start + i)[:, None]
    tl.store(steps + where, step, mask=inside)
    tl.store(totals + where, total, mask=inside)


@triton.jit
def mamba2_pairs(
    B, C, pairs, chunks,
    size, B_t, B_g, C_t, C_g, pair_t, pair_g,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """C of every token of one chunk times B of every other, for one group: (T, G, L)."""
    _, _, start, length = chunk_at(chunks, tl.program_id(0))
    if length <= 0:
        return
    group = tl.program_id(1)
    B += start * B_t + group * B_g
    C += start * C_t + group * C_g
    i = tl.arange(0, BLOCK_L)
    n = tl.arange(0, BLOCK_N)
    valid = i < length
    product = tl.zeros((BLOCK_L, BLOCK_L), tl.float32)
    for first in range(0, size, BLOCK_N):
        inside = valid[:, None] & (first + n < size)[None, :]
        b = tl.load(B + i[:, None] * B_t + first + n[None, :], mask=inside, other=0.0).to(OPERAND)
        c = tl.load(C + i[:, None] * C_t + first + n[None, :], mask=inside, other=0.0).to(OPERAND)
        product = tl.dot(c, tl.trans(b), acc=product, input_precision=PRECISION)
    pairs += start * pair_t + group * pair_g
    tl.store(pairs + i[:, None] * pair_t + i[None, :], product.to(pairs.dtype.element_ty), mask=valid[:, None])


@triton.jit(do_not_specialize=["num_tokens"])
def mamba2_states(
    x, B, steps, totals, state, before, slots, fresh, query_start, firsts,
    width, size, num_tokens,
    x_t, x_h, B_t, B_g, state_s, state_h, state_p, state_n, before_c, before_h, before_n,
    HEADS_PER_GROUP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state before each chunk of one request of several, and after the last: one head, one tile of its state."""
    tiles = tl.cdiv(width, BLOCK_P)
    p = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    head = tl.program_id(1)
    request = tl.program_id(2)
    start = tl.load(query_start + request).to(tl.int64)
    length = (tl.load(query_start + request + 1) - start).to(tl.int32)
    slot = tl.load(slots + request).to(tl.int64)
    if (length <= 1) | (slot < 0):
        return
    rows = p < width
    columns = n < size
    inside = columns[:, None] & rows[None, :]
    known = tl.load(fresh + request) == 0
    state += slot * state_s + head * state_h
    page = p[None, :] * state_p + n[:, None] * state_n
    s = tl.load(state + page, mask=inside & known, other=0.0).to(tl.float32)
    x += start * x_t + head * x_h
    B += start * B_t + head // HEADS_PER_GROUP * B_g
    steps += head.to(tl.int64) * num_tokens + start
    totals += head.to(tl.int64) * num_tokens + start
    before += tl.load(firsts + request).to(tl.int64) * before_c + head * before_h
    i = tl.arange(0, BLOCK_L)
    for first in range(0, length, BLOCK_L):
        valid = first + i < length
        stored = inside & ((first > 0) | known)  # nobody reads the zeros before a fresh request
        tl.store(before + n[:, None] * before_n + p[None, :], s.to(before.dtype.element_ty), mask=stored)
        values = tl.load(x + i[:, None] * x_t + p[None, :], mask=valid[:, None] & rows[None, :], other=0.0)
        b = tl.load(B + i[:, None] * B_t + n[None, :], mask=valid[:, None] & columns[None, :], other=0.0)
        step = tl.load(steps + i, mask=valid, other=0.0)
        total = tl.load(totals + i, mask=valid, other=0.0)
        last = tl.load(totals + tl.minimum(BLOCK_L, length - first) - 1)
        fed = values.to(tl.float32) * (step * tl.exp2(last - total))[:, None]
        s = tl.dot(tl.trans(b.to(OPERAND)), fed.to(OPERAND), acc=s * tl.exp2(last), input_precision=PRECISION)
        x += BLOCK_L * x_t  # offsets inside a chunk stay 32-bit
        B += BLOCK_L * B_t
        steps += BLOCK_L
        totals += BLOCK_L
        before += before_c
    tl.store(state + page, s.to(state.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def mamba2_outputs(
    x, C, D, z, steps, totals, pairs, before, out, slots, fresh, chunks,
    width, size, num_tokens,
    x_t, x_h, C_t, C_g, pair_t, pair_g, D_h, D_p, z_t, z_h, before_c, before_h, before_n, out_t, out_h,
    HEADS_PER_GROUP: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_L: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_T tokens of one chunk, one head, BLOCK_P columns: what the state before the chunk and its tokens give."""
    chunk = tl.program_id(2)
    request, number, start, length = chunk_at(chunks, chunk)
    tiles = tl.cdiv(width, BLOCK_P)
    first = tl.program_id(0) // tiles * BLOCK_T
    if first >= length:
        return
    p = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    head = tl.program_id(1)
    rows = p < width
    i = first + tl.arange(0, BLOCK_T)
    valid = i < length
    tokens = valid[:, None] & rows[None, :]
    out += start * out_t + head * out_h
    if tl.load(slots + request) < 0:
        nothing = tl.zeros((BLOCK_T, BLOCK_P), out.dtype.element_ty)
        tl.store(out + i[:, None] * out_t + p[None, :], nothing, mask=tokens)
        return
    group = head // HEADS_PER_GROUP
    x += start * x_t + head * x_h
    C += start * C_t + group * C_g
    pairs += start * pair_t + group * pair_g
    steps += head.to(tl.int64) * num_tokens + start
    totals += head.to(tl.int64) * num_tokens + start
    total = tl.load(totals + i, mask=valid, other=0.0)
    y = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    if (number > 0) | (tl.load(fresh + request) == 0):
        before += chunk.to(tl.int64) * before_c + head * before_h
        n = tl.arange(0, BLOCK_N)
        for part in range(0, size, BLOCK_N):
            columns = part + n < size
            c = tl.load(C + i[:, None] * C_t + part + n[None, :], mask=valid[:, None] & columns[None, :], other=0.0)
            s = tl.load(
                before + (part + n)[:, None] * before_n + p[None, :], mask=columns[:, None] & rows[None, :], other=0.0
            )
            y = tl.dot(c.to(OPERAND), s.to(OPERAND), acc=y, input_precision=PRECISION)
        y *= tl.exp2(total)[:, None]
    j = tl.arange(0, BLOCK_J)
    for other in range(0, tl.minimum(first + BLOCK_T, length), BLOCK_J):
        given = other + j
        here = given < length
        weight = tl.load(
            pairs + i[:, None] * pair_t + given[None, :], mask=valid[:, None] & here[None, :], other=0.0
        ).to(tl.float32)
        # a token reaches a later one with what has not decayed in between
        gap = total[:, None] - tl.load(totals + given, mask=here, other=0.0)[None, :]
        gap = tl.where(i[:, None] >= given[None, :], gap, float("-inf"))
        weight *= tl.exp2(gap) * tl.load(steps + given, mask=here, other=0.0)[None, :]
        values = tl.load(x + given[:, None] * x_t + p[None, :], mask=here[:, None] & rows[None, :], other=0.0)
        y = tl.dot(weight.to(OPERAND), values.to(OPERAND), acc=y, input_precision=PRECISION)
    if HAS_D:
        skip = tl.load(D + head * D_h + p * D_p, mask=rows, other=0.0).to(tl.float32)
        own = tl.load(x + i[:, None] * x_t + p[None, :], mask=tokens, other=0.0)
        y += own.to(tl.float32) * skip[None, :]
    if HAS_Z:
        z += start * z_t + head * z_h
        y *= silu(tl.load(z + i[:, None] * z_t + p[None, :], mask=tokens, other=0.0).to(tl.float32))
    tl.store(out + i[:, None] * out_t + p[None, :], y.to(out.dtype.element_ty), mask=tokens)
