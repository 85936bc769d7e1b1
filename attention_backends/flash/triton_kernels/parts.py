"""Steps that the kernels share: one place for each formula, so that the kernels round alike."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def soft_capped(s, cap):
    """``cap * tanh(s / cap)`` for scores in units of log2(e), in and out."""
    x = tl.exp2(-2.0 * tl.abs(s) / cap)
    return tl.where(s < 0, -1.0, 1.0) * cap * 1.4426950408889634 * ((1.0 - x) / (1.0 + x))


@triton.jit
def finite(m):
    """A maximum that may be subtracted: 0 for rows that have seen no key."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def combined(m, norm, acc, m1, norm1, acc1):
    """Partial sums of two sets of keys as those of their union; rows (R,), (R,), (R, Dv)."""
    m_new = tl.maximum(m, m1)
    c0 = tl.exp2(m - finite(m_new))
    c1 = tl.exp2(m1 - finite(m_new))
    return m_new, norm * c0 + norm1 * c1, acc * c0[:, None] + acc1 * c1[:, None]


@triton.jit
def with_sink(m, norm, acc, sink):
    """One more logit a row, in units of log2(e), with no value behind it."""
    m_new = tl.maximum(m, sink)
    c0 = tl.exp2(m - m_new)
    return m_new, norm * c0 + tl.exp2(sink - m_new), acc * c0[:, None]


@triton.jit
def row_sums(w, KEYS: tl.constexpr):
    """Sums of (R, KEYS) over the keys by a matrix product, which adds in one order whatever the layout of ``w`` is."""
    ones = tl.full([KEYS, 16], 1.0, w.dtype)
    return tl.max(tl.dot(w, ones), 1)


@triton.jit
def column_sums(w, KEYS: tl.constexpr):
    """As :func:`row_sums`, of (KEYS, R)."""
    ones = tl.full([16, KEYS], 1.0, w.dtype)
    return tl.max(tl.dot(ones, w), 0)
