"""Causal depthwise convolution: one step for decodes, tiles of tokens for longer requests."""

import triton
import triton.language as tl

from .numerics import silu


@triton.jit
def conv_step(
    x, weight, bias, state, out, slots, fresh, query_start,
    channels, x_t, weight_c, weight_k, state_s, state_c, state_w, out_t,
    W: tl.constexpr, W_PADDED: tl.constexpr, K: tl.constexpr,
    BIAS: tl.constexpr, SILU: tl.constexpr, PACKED: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One token of one request and BLOCK_C channels. PACKED: token i belongs to request i."""
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
    w = tl.arange(0, W_PADDED)
    pages = state + slot * state_s + c[:, None] * state_c
    held = inside[:, None] & known
    new = tl.load(x + token * x_t + c, mask=inside, other=0.0).to(tl.float32)
    old = tl.load(pages + w[None, :] * state_w, mask=held & (w < W)[None, :], other=0.0)
    shifted = tl.load(pages + (w + 1)[None, :] * state_w, mask=held & (w < W - 1)[None, :], other=0.0)
    shifted = tl.where((w == W - 1)[None, :], new[:, None].to(shifted.dtype), shifted)
    tap = w - (W - K + 1)
    taps = tl.load(
        weight + c[:, None] * weight_c + tap[None, :] * weight_k,
        mask=inside[:, None] & ((tap >= 0) & (tap < K - 1))[None, :], other=0.0,
    )  # fmt: skip
    last = tl.load(weight + c * weight_c + (K - 1) * weight_k, mask=inside, other=0.0).to(tl.float32)
    y = tl.sum(old.to(tl.float32) * taps.to(tl.float32), 1) + new * last
    if BIAS:
        y += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        y = silu(y)
    tl.debug_barrier()  # every warp has read the page before one writes it
    tl.store(pages + w[None, :] * state_w, shifted, mask=inside[:, None] & (w < W)[None, :])
    tl.store(out + token * out_t + c, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def conv_chunk(
    x, weight, bias, state, out, slots, fresh, query_start, chunks,
    requests, channels, x_t, weight_c, weight_k, state_s, state_c, state_w, out_t,
    W: tl.constexpr, W_PADDED: tl.constexpr, K: tl.constexpr,
    BIAS: tl.constexpr, SILU: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_T tokens of one request and BLOCK_C channels; the first tile of a request also updates its page.

    Only the first tile reads the old page (BLOCK_T >= K), so that nobody reads what it writes.
    """
    request = tl.load(chunks + 2 * tl.program_id(0))
    if request >= requests:
        return
    number = tl.load(chunks + 2 * tl.program_id(0) + 1)
    start = tl.load(query_start + request).to(tl.int64)
    length = (tl.load(query_start + request + 1) - start).to(tl.int32)
    slot = tl.load(slots + request).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    t = number * BLOCK_T + tl.arange(0, BLOCK_T)
    rows = (start + t)[:, None]
    valid = (t < length)[:, None] & inside[None, :]
    if slot < 0:
        tl.store(out + rows * out_t + c[None, :], tl.zeros((BLOCK_T, BLOCK_C), out.dtype.element_ty), mask=valid)
        return
    known = (tl.load(fresh + request) == 0) & (number == 0)
    page = state + slot * state_s
    y = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for k in tl.static_range(K):
        back = K - 1 - k
        seen = tl.load(x + (rows - back) * x_t + c[None, :], mask=valid & (t >= back)[:, None], other=0.0)
        seen = seen.to(tl.float32)
        if back > 0:
            before = tl.load(
                page + c[None, :] * state_c + (W + t - back)[:, None] * state_w,
                mask=valid & (known & (t < back))[:, None], other=0.0,
            )  # fmt: skip
            seen += before.to(tl.float32)
        tap = tl.load(weight + c * weight_c + k * weight_k, mask=inside, other=0.0).to(tl.float32)
        y += seen * tap[None, :]
    if BIAS:
        y += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    if SILU:
        y = silu(y)
    tl.store(out + rows * out_t + c[None, :], y.to(out.dtype.element_ty), mask=valid)
    if number == 0:
        w = tl.arange(0, W_PADDED)
        source = length - W + w
        columns = inside[:, None] & (w < W)[None, :]
        fed = tl.load(
            x + (start + source)[None, :] * x_t + c[:, None], mask=columns & (source >= 0)[None, :], other=0.0
        ).to(tl.float32)
        held = tl.load(
            page + c[:, None] * state_c + (W + source)[None, :] * state_w,
            mask=columns & (known & (source < 0))[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        tl.debug_barrier()  # every warp has read the page before one writes it
        tl.store(
            page + c[:, None] * state_c + w[None, :] * state_w, (fed + held).to(state.dtype.element_ty), mask=columns
        )
