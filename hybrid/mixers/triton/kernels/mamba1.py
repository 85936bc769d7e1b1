"""Mamba 1: one program walks the tokens of a request with the states of some channels in registers."""

import triton
import triton.language as tl

from .numerics import silu, softplus


@triton.jit
def mamba1_scan(
    x, dt, A, B, C, D, dt_bias, z, state, out, slots, fresh, query_start,
    width, size,
    x_t, dt_t, A_i, A_n, B_t, B_g, C_t, C_g, z_t, state_s, state_g, state_i, state_n, out_t,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_Z: tl.constexpr, SOFTPLUS: tl.constexpr,
    PACKED: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_N: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """All tokens of one request, BLOCK_I channels of one group. PACKED: token i belongs to request i."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    j = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    group = tl.program_id(1)
    request = tl.program_id(2)
    start = request.to(tl.int64)
    length = 1
    if not PACKED:
        start = tl.load(query_start + request).to(tl.int64)
        length = (tl.load(query_start + request + 1) - start).to(tl.int32)
    if length == 0:
        return
    slot = tl.load(slots + request).to(tl.int64)
    rows = j < width
    i = group * width + j
    out += start * out_t + i
    if slot < 0:
        for _ in range(length):
            tl.store(out, tl.zeros((BLOCK_I,), out.dtype.element_ty), mask=rows)
            out += out_t
        return
    x += start * x_t + i
    dt += start * dt_t + i
    if HAS_Z:
        z += start * z_t + i
    n = tl.arange(0, BLOCK_N)
    columns = n < size
    B += start * B_t + group * B_g + n
    C += start * C_t + group * C_g + n
    inside = rows[:, None] & columns[None, :]
    page = state + slot * state_s + group * state_g + j[:, None] * state_i + n[None, :] * state_n
    known = tl.load(fresh + request) == 0
    s = tl.load(page, mask=inside & known, other=0.0).to(tl.float32)
    a = tl.load(A + i[:, None] * A_i + n[None, :] * A_n, mask=inside, other=0.0).to(tl.float32) * 1.4426950408889634
    bias = tl.zeros((BLOCK_I,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(dt_bias + i, mask=rows, other=0.0).to(tl.float32)
    skip = tl.zeros((BLOCK_I,), tl.float32)
    if HAS_D:
        skip = tl.load(D + i, mask=rows, other=0.0).to(tl.float32)
    value = tl.load(x, mask=rows, other=0.0)
    raw = tl.load(dt, mask=rows, other=0.0)
    b = tl.load(B, mask=columns, other=0.0)
    c = tl.load(C, mask=columns, other=0.0)
    for t in range(length):
        x += x_t
        dt += dt_t
        B += B_t
        C += C_t
        more = t + 1 < length  # the next token is on its way while this one is computed
        next_value = tl.load(x, mask=rows & more, other=0.0)
        next_raw = tl.load(dt, mask=rows & more, other=0.0)
        next_b = tl.load(B, mask=columns & more, other=0.0)
        next_c = tl.load(C, mask=columns & more, other=0.0)
        step = raw.to(tl.float32) + bias
        if SOFTPLUS:
            step = softplus(step)
        v = value.to(tl.float32)
        s = s * tl.exp2(step[:, None] * a) + (step * v)[:, None] * b.to(tl.float32)[None, :]
        y = tl.sum(s * c.to(tl.float32)[None, :], 1) + skip * v
        if HAS_Z:
            y *= silu(tl.load(z, mask=rows, other=0.0).to(tl.float32))
            z += z_t
        tl.store(out, y.to(out.dtype.element_ty), mask=rows)
        out += out_t
        value = next_value
        raw = next_raw
        b = next_b
        c = next_c
    tl.store(page, s.to(state.dtype.element_ty), mask=inside)
