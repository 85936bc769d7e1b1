"""States between pages and packed tensors, for kernels of libraries that cannot read pages; and padding's outputs."""

import triton
import triton.language as tl


@triton.jit
def gather_pages(
    state, slots, fresh, out,
    state_s, state_0, state_1, state_2,
    SIZE_0: tl.constexpr, SIZE_1: tl.constexpr, SIZE_2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of one request's state, (R, SIZE_0, SIZE_1, SIZE_2); zeros where there is none."""
    request = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE_0 * SIZE_1 * SIZE_2
    slot = tl.load(slots + request).to(tl.int64)
    known = (slot >= 0) & (tl.load(fresh + request) == 0)
    where = at // (SIZE_1 * SIZE_2) * state_0 + at // SIZE_2 % SIZE_1 * state_1 + at % SIZE_2 * state_2
    values = tl.load(state + slot * state_s + where, mask=inside & known, other=0.0)
    target = out + request.to(tl.int64) * (SIZE_0 * SIZE_1 * SIZE_2) + at
    tl.store(target, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def scatter_pages(
    values, slots, state,
    state_s, state_0, state_1, state_2,
    SIZE_0: tl.constexpr, SIZE_1: tl.constexpr, SIZE_2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The way back; requests without a page write nothing."""
    request = tl.program_id(1)
    slot = tl.load(slots + request).to(tl.int64)
    if slot < 0:
        return
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE_0 * SIZE_1 * SIZE_2
    new = tl.load(values + request.to(tl.int64) * (SIZE_0 * SIZE_1 * SIZE_2) + at, mask=inside, other=0.0)
    where = at // (SIZE_1 * SIZE_2) * state_0 + at // SIZE_2 % SIZE_1 * state_1 + at % SIZE_2 * state_2
    tl.store(state + slot * state_s + where, new.to(state.dtype.element_ty), mask=inside)


@triton.jit
def clear_padding(out, slots, starts, width, BLOCK: tl.constexpr):
    """Zeros for the tokens (T, width) of a request that only fills the step; BLOCK of their columns."""
    request = tl.program_id(1)
    if tl.load(slots + request) >= 0:
        return
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(starts + request).to(tl.int64)
    end = tl.load(starts + request + 1).to(tl.int64)
    out += first * width + c
    for _ in range((end - first).to(tl.int32)):
        tl.store(out, tl.zeros((BLOCK,), out.dtype.element_ty), mask=c < width)
        out += width
