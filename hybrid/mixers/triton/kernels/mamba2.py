"""Mamba 2: one step per decode, and a scan that walks a longer request chunk by chunk with its state in registers.

The scan keeps everything transposed, (P, tokens) and (P, N), so that the state is the left side of its products: it
goes from accumulators to operands without leaving the registers.
"""

import triton
import triton.language as tl

from .numerics import silu, time_step


@triton.jit
def mamba2_step(
    x, dt, A, B, C, D, dt_bias, z, state, out, slots, fresh, query_start,
    width, size, low, high, decode_low, decode_high,
    x_t, x_h, dt_t, B_t, B_g, C_t, C_g, D_h, D_p, z_t, z_h, state_s, state_h, state_p, state_n, out_t, out_h,
    HEADS_PER_GROUP: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_Z: tl.constexpr,
    SOFTPLUS: tl.constexpr, PACKED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One token of one request, one head, BLOCK_P rows of its state."""
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


@triton.jit
def mamba2_decays(
    dt, A, dt_bias, steps, totals, query_start, chunks,
    requests, heads, tokens, low, high, dt_t,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Time steps of one chunk, and their decays (in powers of two) summed from the chunk's first token: (H, T) each."""
    request = tl.load(chunks + 2 * tl.program_id(0))
    if request >= requests:
        return
    number = tl.load(chunks + 2 * tl.program_id(0) + 1)
    start = tl.load(query_start + request)
    end = tl.load(query_start + request + 1)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    t = start + number * BLOCK_L + tl.arange(0, BLOCK_L)
    inside = (h < heads)[None, :] & (t < end)[:, None]
    raw = tl.load(dt + t[:, None].to(tl.int64) * dt_t + h[None, :], mask=inside, other=0.0).to(tl.float32)
    bias = tl.zeros((BLOCK_H,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(dt_bias + h, mask=h < heads, other=0.0).to(tl.float32)
    step = tl.where(inside, time_step(raw, bias[None, :], low, high, SOFTPLUS), 0.0)
    a = tl.load(A + h, mask=h < heads, other=0.0).to(tl.float32) * 1.4426950408889634
    total = tl.cumsum(step * a[None, :], 0)
    where = h[None, :].to(tl.int64) * tokens + t[:, None]
    tl.store(steps + where, step, mask=inside)
    tl.store(totals + where, total, mask=inside)


@triton.jit
def mamba2_scan(
    x, B, C, D, z, steps, totals, state, out, slots, fresh, query_start,
    width, size, num_tokens,
    x_t, x_h, B_t, B_g, C_t, C_g, D_h, D_p, z_t, z_h, state_s, state_h, state_p, state_n, out_t, out_h,
    HEADS_PER_GROUP: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All tokens of one request of several, one head, BLOCK_P rows of its state."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    head = tl.program_id(1)
    request = tl.program_id(2)
    start = tl.load(query_start + request).to(tl.int64)
    length = (tl.load(query_start + request + 1) - start).to(tl.int32)
    if length <= 1:
        return
    slot = tl.load(slots + request).to(tl.int64)
    rows = p < width
    i = tl.arange(0, BLOCK_L)
    out += start * out_t + head * out_h
    if slot < 0:
        for first in range(0, length, BLOCK_L):
            where = (first + i < length)[:, None] & rows[None, :]
            nothing = tl.zeros((BLOCK_L, BLOCK_P), out.dtype.element_ty)
            tl.store(out + i[:, None] * out_t + p[None, :], nothing, mask=where)
            out += BLOCK_L * out_t
        return
    group = head // HEADS_PER_GROUP
    x += start * x_t + head * x_h
    steps += head.to(tl.int64) * num_tokens + start
    totals += head.to(tl.int64) * num_tokens + start
    B += start * B_t + group * B_g
    C += start * C_t + group * C_g
    if HAS_Z:
        z += start * z_t + head * z_h
    n = tl.arange(0, BLOCK_N)
    columns = n < size
    inside = columns[:, None] & rows[None, :]
    page = state + slot * state_s + head * state_h + p[None, :] * state_p + n[:, None] * state_n
    known = tl.load(fresh + request) == 0
    s = tl.load(page, mask=inside & known, other=0.0).to(tl.float32)
    if HAS_D:
        skip = tl.load(D + head * D_h + p * D_p, mask=rows, other=0.0).to(tl.float32)
    for first in range(0, length, BLOCK_L):
        valid = first + i < length
        tokens = valid[:, None] & rows[None, :]
        sides = valid[:, None] & columns[None, :]
        values = tl.load(x + i[:, None] * x_t + p[None, :], mask=tokens, other=0.0)
        b = tl.load(B + i[:, None] * B_t + n[None, :], mask=sides, other=0.0).to(OPERAND)
        c = tl.load(C + i[:, None] * C_t + n[None, :], mask=sides, other=0.0).to(OPERAND)
        step = tl.load(steps + i, mask=valid, other=0.0)
        last = tl.load(totals + tl.minimum(BLOCK_L, length - first) - 1)
        total = tl.load(totals + i, mask=valid, other=0.0)
        y = tl.dot(c, s.to(OPERAND), input_precision=PRECISION) * tl.exp2(total)[:, None]
        # token s reaches token l with what has not decayed in between
        gap = tl.where(i[:, None] >= i[None, :], total[:, None] - total[None, :], float("-inf"))
        weights = tl.dot(c, tl.trans(b), input_precision=PRECISION) * tl.exp2(gap) * step[None, :]
        y = tl.dot(weights.to(OPERAND), values.to(OPERAND), acc=y, input_precision=PRECISION)
        left = (step * tl.exp2(last - total))[:, None]
        fed = (values.to(tl.float32) * left).to(OPERAND)
        s = tl.dot(tl.trans(b), fed, acc=s * tl.exp2(last), input_precision=PRECISION)
        if HAS_D:
            y += values.to(tl.float32) * skip[None, :]
        if HAS_Z:
            gate = tl.load(z + i[:, None] * z_t + p[None, :], mask=tokens, other=0.0).to(tl.float32)
            y *= silu(gate)
        tl.store(out + i[:, None] * out_t + p[None, :], y.to(out.dtype.element_ty), mask=tokens)
        x += BLOCK_L * x_t  # offsets inside a chunk stay 32-bit
        steps += BLOCK_L
        totals += BLOCK_L
        B += BLOCK_L * B_t
        C += BLOCK_L * C_t
        if HAS_Z:
            z += BLOCK_L * z_t
        out += BLOCK_L * out_t
    tl.store(page, s.to(state.dtype.element_ty), mask=inside)
