"""Causal depthwise convolution: one step for decodes, tiles of tokens for longer requests.

A token's taps are added oldest first in every kernel, so that its bits do not depend on where a prefill was cut.
"""

import triton
import triton.language as tl

from .numerics import chunk_at, silu


@triton.jit
def activated(y, bias, SILU: tl.constexpr):
    """Bias and activation of a sum of taps."""
    y += bias
    if SILU:
        y = silu(y)
    return y


@triton.jit
def conv_step(
    x, weight, bias, state, out, slots, fresh, query_start,
    channels, x_t, weight_c, weight_k, state_s, state_c, state_w, out_t,
    W: tl.constexpr, K: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_C: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One token of one request and BLOCK_C channels. PACKED: token i belongs to request i."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    request = tl.program_id(1)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    token = request
    if not PACKED:
        token = tl.load(query_start + request)
        if tl.load(query_start + request + 1) - token != 1:
            return
    token = token.to(tl.int64)
    slot = tl.load(slots + request).to(tl.int64)
    inside = c < channels
    if slot < 0:
        tl.store(out + token * out_t + c, tl.zeros((BLOCK_C,), out.dtype.element_ty), mask=inside)
        return
    known = inside & (tl.load(fresh + request) == 0)
    page = state + slot * state_s + c * state_c
    new = tl.load(x + token * x_t + c, mask=inside, other=0.0)
    offset = tl.zeros((BLOCK_C,), tl.float32)
    if BIAS:
        offset = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    y = tl.zeros((BLOCK_C,), tl.float32)
    if (W == 4) & (K == 4):  # whole rows in one access each, columns taken apart in registers
        w = tl.arange(0, 4)
        old = tl.load(page[:, None] + w[None, :] * state_w, mask=known[:, None], other=0.0)
        taps = tl.load(weight + c[:, None] * weight_c + w[None, :] * weight_k, mask=inside[:, None], other=0.0)
        even, odd = tl.split(tl.reshape(old, (BLOCK_C, 2, 2)))
        _, third = tl.split(even)
        second, fourth = tl.split(odd)
        even, odd = tl.split(tl.reshape(taps.to(tl.float32), (BLOCK_C, 2, 2)))
        tap0, tap2 = tl.split(even)
        tap1, tap3 = tl.split(odd)
        y += second.to(tl.float32) * tap0
        y += third.to(tl.float32) * tap1
        y += fourth.to(tl.float32) * tap2
        y += new.to(tl.float32) * tap3
        shifted = tl.join(tl.join(second, fourth), tl.join(third, new.to(old.dtype)))
        tl.store(page[:, None] + w[None, :] * state_w, tl.reshape(shifted, (BLOCK_C, 4)), mask=inside[:, None])
    else:
        for k in tl.static_range(K - 1):
            old = tl.load(page + (W - K + 1 + k) * state_w, mask=known, other=0.0).to(tl.float32)
            y += old * tl.load(weight + c * weight_c + k * weight_k, mask=inside, other=0.0).to(tl.float32)
        y += new.to(tl.float32) * tl.load(weight + c * weight_c + (K - 1) * weight_k, mask=inside, other=0.0).to(
            tl.float32
        )
        for w in tl.static_range(W - 1):  # a thread owns its channel: each column is read before it is written
            kept = tl.load(page + (w + 1) * state_w, mask=known, other=0.0)
            tl.store(page + w * state_w, kept, mask=inside)
        tl.store(page + (W - 1) * state_w, new.to(state.dtype.element_ty), mask=inside)
    y = activated(y, offset, SILU)
    tl.store(out + token * out_t + c, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def one_before(x, page, x_t, state_w, inside, known, later, BACK: tl.constexpr, W: tl.constexpr):
    """The input BACK tokens before ``x``: of this step, or of the page where the request's tile is its first."""
    fed = tl.load(x - BACK * x_t, mask=inside & later, other=0.0).to(tl.float32)
    kept = tl.load(page + (W - BACK) * state_w, mask=inside & known, other=0.0).to(tl.float32)
    return tl.where(later, fed, kept)


@triton.jit
def four_taps(oldest, second, third, newest, tap0, tap1, tap2, tap3):
    """Taps of a kernel of four columns; of a narrower one the first are zero, and so are their inputs."""
    y = tl.zeros_like(newest)
    y += oldest * tap0
    y += second * tap1
    y += third * tap2
    y += newest * tap3
    return y


@triton.jit
def conv_chunk(
    x, weight, bias, state, out, slots, fresh, chunks,
    channels, x_t, weight_c, weight_k, state_s, state_c, state_w, out_t,
    W: tl.constexpr, K: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_T tokens of one request and BLOCK_C channels, four tokens at a time; the inputs before stay in registers.

    Only the first tile of a request reads the page, and then updates it. Kernels of two to four columns; those of a
    narrower one are widened with zeros on both sides of every product.
    """
    request, number, start, left = chunk_at(chunks, tl.program_id(0))
    if left <= 0:
        return
    slot = tl.load(slots + request).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    length = tl.minimum(left, BLOCK_T)
    x += start * x_t + c  # offsets inside a tile stay 32-bit
    out += start * out_t + c
    if slot < 0:
        for _ in range(length):
            tl.store(out, tl.zeros((BLOCK_C,), out.dtype.element_ty), mask=inside)
            out += out_t
        return
    later = number > 0
    known = (number == 0) & (tl.load(fresh + request) == 0)
    page = state + slot * state_s + c * state_c
    weight += c * weight_c
    nothing = tl.zeros((BLOCK_C,), tl.float32)
    offset = nothing
    if BIAS:
        offset = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    tap3 = tl.load(weight + (K - 1) * weight_k, mask=inside, other=0.0).to(tl.float32)
    tap2 = tl.load(weight + (K - 2) * weight_k, mask=inside, other=0.0).to(tl.float32)
    third = one_before(x, page, x_t, state_w, inside, known, later, 1, W)
    second = nothing
    tap1 = nothing
    oldest = nothing
    tap0 = nothing
    if K > 2:
        tap1 = tl.load(weight + (K - 3) * weight_k, mask=inside, other=0.0).to(tl.float32)
        second = one_before(x, page, x_t, state_w, inside, known, later, 2, W)
    if K > 3:
        tap0 = tl.load(weight, mask=inside, other=0.0).to(tl.float32)
        oldest = one_before(x, page, x_t, state_w, inside, known, later, 3, W)
    source = x
    for first in range(0, length, 4):
        some = length - first
        new0 = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        new1 = tl.load(source + x_t, mask=inside & (some > 1), other=0.0).to(tl.float32)
        new2 = tl.load(source + 2 * x_t, mask=inside & (some > 2), other=0.0).to(tl.float32)
        new3 = tl.load(source + 3 * x_t, mask=inside & (some > 3), other=0.0).to(tl.float32)
        if K == 4:
            y0 = four_taps(oldest, second, third, new0, tap0, tap1, tap2, tap3)
            y1 = four_taps(second, third, new0, new1, tap0, tap1, tap2, tap3)
            y2 = four_taps(third, new0, new1, new2, tap0, tap1, tap2, tap3)
            y3 = four_taps(new0, new1, new2, new3, tap0, tap1, tap2, tap3)
        elif K == 3:
            y0 = four_taps(nothing, second, third, new0, nothing, tap1, tap2, tap3)
            y1 = four_taps(nothing, third, new0, new1, nothing, tap1, tap2, tap3)
            y2 = four_taps(nothing, new0, new1, new2, nothing, tap1, tap2, tap3)
            y3 = four_taps(nothing, new1, new2, new3, nothing, tap1, tap2, tap3)
        else:
            y0 = four_taps(nothing, nothing, third, new0, nothing, nothing, tap2, tap3)
            y1 = four_taps(nothing, nothing, new0, new1, nothing, nothing, tap2, tap3)
            y2 = four_taps(nothing, nothing, new1, new2, nothing, nothing, tap2, tap3)
            y3 = four_taps(nothing, nothing, new2, new3, nothing, nothing, tap2, tap3)
        tl.store(out, activated(y0, offset, SILU).to(out.dtype.element_ty), mask=inside)
        tl.store(out + out_t, activated(y1, offset, SILU).to(out.dtype.element_ty), mask=inside & (some > 1))
        tl.store(out + 2 * out_t, activated(y2, offset, SILU).to(out.dtype.element_ty), mask=inside & (some > 2))
        tl.store(out + 3 * out_t, activated(y3, offset, SILU).to(out.dtype.element_ty), mask=inside & (some > 3))
        oldest = new1
        second = new2
        third = new3
        source += 4 * x_t
        out += 4 * out_t
    if number == 0:
        for w in tl.static_range(W):  # a thread owns its channel: each column is read before it is written
            fed = left - W + w
            given = tl.load(x + fed.to(tl.int64) * x_t, mask=inside & (fed >= 0), other=0.0).to(tl.float32)
            kept = tl.load(page + (W + fed) * state_w, mask=inside & known & (fed < 0), other=0.0).to(tl.float32)
            tl.store(page + w * state_w, tl.where(fed >= 0, given, kept).to(state.dtype.element_ty), mask=inside)


@triton.jit
def conv_chunk_wide(
    x, weight, bias, state, out, slots, fresh, chunks,
    channels, x_t, weight_c, weight_k, state_s, state_c, state_w, out_t,
    W: tl.constexpr, K: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The same for kernels of any width: token by token, every input loaded once per tap."""
    request, number, start, left = chunk_at(chunks, tl.program_id(0))
    if left <= 0:
        return
    slot = tl.load(slots + request).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    x += start * x_t + c
    out += start * out_t + c
    known = (number == 0) & (tl.load(fresh + request) == 0)
    used = slot >= 0
    page = state + slot * state_s + c * state_c
    offset = tl.zeros((BLOCK_C,), tl.float32)
    if BIAS:
        offset = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    for t in range(tl.minimum(left, BLOCK_T)):
        y = tl.zeros((BLOCK_C,), tl.float32)
        for k in tl.static_range(K):
            back = K - 1 - k
            here = (number > 0) | (t >= back)
            fed = tl.load(x + (t - back) * x_t, mask=inside & here, other=0.0).to(tl.float32)
            kept = tl.load(page + (W + t - back) * state_w, mask=inside & known & (t < back), other=0.0)
            tap = tl.load(weight + c * weight_c + k * weight_k, mask=inside, other=0.0).to(tl.float32)
            y += tl.where(here, fed, kept.to(tl.float32)) * tap
        y = tl.where(used, activated(y, offset, SILU), 0.0)
        tl.store(out + t * out_t, y.to(out.dtype.element_ty), mask=inside)
    if used & (number == 0):
        for w in tl.static_range(W):
            fed = left - W + w
            given = tl.load(x + fed.to(tl.int64) * x_t, mask=inside & (fed >= 0), other=0.0).to(tl.float32)
            kept = tl.load(page + (W + fed) * state_w, mask=inside & known & (fed < 0), other=0.0).to(tl.float32)
            tl.store(page + w * state_w, tl.where(fed >= 0, given, kept).to(state.dtype.element_ty), mask=inside)
