"""Causal depthwise convolution: one step for decodes, tiles of tokens for longer requests."""

import triton
import triton.language as tl

from .numerics import chunk_at, silu


@triton.jit
def conv_step(
    x, weight, bias, state, out, slots, fresh, query_start,
    channels, x_t, weight_c, weight_k, state_s, state_c, state_w, out_t,
    W: tl.constexpr, W_PADDED: tl.constexpr, K: tl.constexpr,
    BIAS: tl.constexpr, SILU: tl.constexpr, PACKED: tl.constexpr, BLOCK_C: tl.constexpr, EARLY: tl.constexpr,
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
    known = tl.load(fresh + request) == 0
    pages = state + slot * state_s + c[:, None] * state_c
    new = tl.load(x + token * x_t + c, mask=inside, other=0.0)
    w = tl.arange(0, W_PADDED)
    columns = inside[:, None] & (w < W)[None, :]
    old = tl.load(pages + w[None, :] * state_w, mask=columns & known, other=0.0)
    if (W == 4) & (K == 4):  # whole rows in one access each, columns taken apart in registers
        taps = tl.load(weight + c[:, None] * weight_c + w[None, :] * weight_k, mask=inside[:, None], other=0.0)
        even, odd = tl.split(tl.reshape(old, (BLOCK_C, 2, 2)))
        _, third = tl.split(even)
        second, fourth = tl.split(odd)
        even, odd = tl.split(tl.reshape(taps.to(tl.float32), (BLOCK_C, 2, 2)))
        tap0, tap2 = tl.split(even)
        tap1, tap3 = tl.split(odd)
        y = second.to(tl.float32) * tap0 + third.to(tl.float32) * tap1
        y += fourth.to(tl.float32) * tap2 + new.to(tl.float32) * tap3
        shifted = tl.join(tl.join(second, fourth), tl.join(third, new.to(old.dtype)))
        shifted = tl.reshape(shifted, (BLOCK_C, W_PADDED))
    else:
        shifted = tl.load(
            pages + (w + 1)[None, :] * state_w, mask=inside[:, None] & (known & (w < W - 1))[None, :], other=0.0
        )
        shifted = tl.where((w == W - 1)[None, :], new[:, None].to(shifted.dtype), shifted)
        tap = w - (W - K + 1)
        taps = tl.load(
            weight + c[:, None] * weight_c + tap[None, :] * weight_k,
            mask=inside[:, None] & ((tap >= 0) & (tap < K - 1))[None, :], other=0.0,
        )  # fmt: skip
        last = tl.load(weight + c * weight_c + (K - 1) * weight_k, mask=inside, other=0.0).to(tl.float32)
        y = tl.sum(old.to(tl.float32) * taps.to(tl.float32), 1) + new.to(tl.float32) * last
        tl.debug_barrier()  # every warp has read the page before one writes it
    if BIAS:
        y += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        y = silu(y)
    tl.store(pages + w[None, :] * state_w, shifted, mask=columns)
    tl.store(out + token * out_t + c, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def conv_chunk(
    x, weight, bias, state, out, slots, fresh, chunks,
    channels, x_t, weight_c, weight_k, state_s, state_c, state_w, out_t,
    W: tl.constexpr, W_PADDED: tl.constexpr, K: tl.constexpr,
    BIAS: tl.constexpr, SILU: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_T tokens of one request and BLOCK_C channels; the first tile of a request also updates its page.

    Only the first tile reads the old page (BLOCK_T >= K), so that nobody reads what it writes.
    """
    request, number, start, left = chunk_at(chunks, tl.program_id(0))
    if left <= 0:
        return
    slot = tl.load(slots + request).to(tl.int64)
    used = slot >= 0
    known = used & (number == 0) & (tl.load(fresh + request) == 0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    t = tl.arange(0, BLOCK_T)
    x += start * x_t  # offsets inside a tile stay 32-bit
    out += start * out_t
    valid = (t < left)[:, None] & inside[None, :]
    page = state + slot * state_s
    y = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    if BIAS:
        y += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(K):
        back = K - 1 - k
        held = valid & ((number > 0) | (t >= back))[:, None]
        seen = tl.load(x + (t - back)[:, None] * x_t + c[None, :], mask=held, other=0.0).to(tl.float32)
        y += seen * tl.load(weight + c * weight_c + k * weight_k, mask=inside, other=0.0).to(tl.float32)[None, :]
    if known:
        for k in tl.static_range(K - 1):
            back = K - 1 - k
            before = tl.load(
                page + c[None, :] * state_c + (W + t - back)[:, None] * state_w,
                mask=valid & (t < back)[:, None], other=0.0,
            )  # fmt: skip
            tap = tl.load(weight + c * weight_c + k * weight_k, mask=inside, other=0.0).to(tl.float32)
            y += before.to(tl.float32) * tap[None, :]
    if SILU:
        y = silu(y)
    y = tl.where(used, y, 0.0)
    tl.store(out + t[:, None] * out_t + c[None, :], y.to(out.dtype.element_ty), mask=valid)
    if used & (number == 0):
        w = tl.arange(0, W_PADDED)
        source = left - W + w
        columns = inside[:, None] & (w < W)[None, :]
        fed = tl.load(
            x + source.to(tl.int64)[None, :] * x_t + c[:, None], mask=columns & (source >= 0)[None, :], other=0.0
        ).to(tl.float32)
        kept = tl.load(
            page + c[:, None] * state_c + (W + source)[None, :] * state_w,
            mask=columns & (known & (source < 0))[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        tl.debug_barrier()  # every warp has read the page before one writes it
        tl.store(
            page + c[:, None] * state_c + w[None, :] * state_w, (fed + kept).to(state.dtype.element_ty), mask=columns
        )
