"""What several kernels share: scalar functions, and a row of the table of chunks."""

import triton
import triton.language as tl


@triton.jit
def softplus(x):
    """log(1 + exp(x)), as exact for very negative x as torch's: there 1 + exp(x) rounds to 1."""
    e = tl.exp(tl.minimum(x, 20.0))
    u = 1.0 + e
    small = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(x > 20.0, x, small)


@triton.jit
def silu(x):
    """x * sigmoid(x)."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def time_step(raw, bias, low, high, SOFTPLUS: tl.constexpr):
    """A raw time step with bias, softplus and clamp."""
    step = raw + bias
    if SOFTPLUS:
        step = softplus(step)
    return tl.minimum(tl.maximum(step, low), high)


@triton.jit
def chunk_at(chunks, row):
    """Request and number of a chunk, its first token, and how many tokens the request has from there on."""
    chunks += 4 * row
    return tl.load(chunks), tl.load(chunks + 1), tl.load(chunks + 2).to(tl.int64), tl.load(chunks + 3)
