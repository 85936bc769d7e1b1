"""Kimi delta attention for requests of several tokens: a delta rule with a decay per key channel, in chunks.

With G the log decays of a channel summed in a chunk, ``kda_sides`` and ``kda_pairs`` make for all chunks at once
k exp(G), what is left of k at the chunk's end, q exp(G), and the products of pairs of tokens, and ``kda_inverses``
solves for what they write; ``kda_states`` walks each request with its state in registers; ``kda_outputs`` does the
rest for all chunks at once.

Products of tokens are those of k exp(G - R) and k exp(R - G), one reference R per 16 tokens: the sum before them, so
that no exponent is positive, and for pairs among them the sum at their middle. Where the decays of 16 tokens are so
strong that this could overflow, those pairs are compared one by one.
"""

import triton
import triton.language as tl

from .delta import inverse_length, small_inverses, whole_inverse
from .numerics import chunk_at


@triton.jit
def rows_of(x, first, length, row, key_size, BLOCK_K: tl.constexpr):
    """16 rows of (length, key_size), float32, from ``first`` on; zeros outside."""
    r = first + tl.arange(0, 16)
    i = tl.arange(0, BLOCK_K)
    inside = (r < length)[:, None] & (i < key_size)[None, :]
    return tl.load(x + r[:, None] * row + i[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def pair_by_pair(keys, queries, sums, k, g, count, key_size, k_t, g_t, NORMALISE: tl.constexpr, BLOCK_K: tl.constexpr):
    """Products of 16 tokens, keys and queries (16, K) with log decays summed to ``sums``, with each other."""
    i = tl.arange(0, BLOCK_K)
    r = tl.arange(0, 16)
    rows = i < key_size
    reached = tl.zeros((BLOCK_K,), tl.float32)
    alike = tl.zeros((16, 16), tl.float32)
    seen = tl.zeros((16, 16), tl.float32)
    k += i
    g += i
    for other in range(count):
        reached += tl.load(g, mask=rows, other=0.0).to(tl.float32)
        given = tl.load(k, mask=rows, other=0.0).to(tl.float32)
        if NORMALISE:
            given *= 1.0 / tl.sqrt(tl.sum(given * given, 0) + 1e-6)
        fed = given[None, :] * tl.exp(tl.minimum(sums - reached[None, :], 0.0))
        here = (r == other)[None, :]
        alike = tl.where(here, tl.sum(keys * fed, 1)[:, None], alike)
        seen = tl.where(here, tl.sum(queries * fed, 1)[:, None], seen)
        k += k_t
        g += g_t
    return alike, seen


@triton.jit
def kda_sides(
    q, k, g, beta, near, asked, fed, sums, alikes, weights, chunks,
    key_size, scale, limit,
    q_t, q_h, k_t, k_h, g_t, g_h, beta_t, side_t, side_h, sum_b, sum_h, alike_t, alike_h, pair_t, pair_h,
    HEADS_PER_KEY: tl.constexpr, NORMALISE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """16 tokens of a chunk and one value head: k and q decayed from their first, k to their last; their own pairs."""
    block = tl.program_id(0)
    first = block * 16
    head = tl.program_id(1)
    chunk = tl.program_id(2)
    _, _, start, length = chunk_at(chunks, chunk)
    length = tl.minimum(length, BLOCK_L)
    if first >= length:
        return
    r = tl.arange(0, 16)
    i = tl.arange(0, BLOCK_K)
    q += start * q_t + head // HEADS_PER_KEY * q_h
    k += start * k_t + head // HEADS_PER_KEY * k_h
    g += start * g_t + head * g_h
    own = first + r
    valid = own < length
    queries = rows_of(q, first, length, q_t, key_size, BLOCK_K)
    keys = rows_of(k, first, length, k_t, key_size, BLOCK_K)
    if NORMALISE:
        queries *= inverse_length(queries)[:, None]
        keys *= inverse_length(keys)[:, None]
    queries *= scale
    decays = rows_of(g, first, length, g_t, key_size, BLOCK_K)
    total = tl.cumsum(decays, 0)
    whole = tl.sum(decays, 0)
    amount = tl.load(beta + (start + own) * beta_t + head, mask=valid, other=0.0).to(tl.float32)
    if tl.min(whole, 0) > limit:
        middle = tl.sum(tl.where((r < 8)[:, None], decays, 0.0), 0)[None, :]
        reach = tl.exp(total - middle)
        across = tl.trans((keys * tl.exp(middle - total)).to(OPERAND))
        alike = tl.dot((keys * reach).to(OPERAND), across, input_precision=PRECISION)
        seen = tl.dot((queries * reach).to(OPERAND), across, input_precision=PRECISION)
    else:
        alike, seen = pair_by_pair(
            keys, queries, total, k + first * k_t, g + first * g_t, tl.minimum(length - first, 16), key_size, k_t, g_t,
            NORMALISE, BLOCK_K,
        )  # fmt: skip
    seen = tl.where(r[:, None] >= r[None, :], seen, 0.0)
    alikes += start * alike_t + head * alike_h + own[:, None] * alike_t + first + r[None, :]
    weights += start * pair_t + head * pair_h + own[:, None] * pair_t + first + r[None, :]
    tl.store(alikes, alike * amount[:, None], mask=valid[:, None])
    tl.store(weights, seen.to(weights.dtype.element_ty), mask=valid[:, None])
    side = start * side_t + head * side_h + own[:, None] * side_t + i[None, :]
    inside = valid[:, None] & (i < key_size)[None, :]
    reach = tl.exp(total)
    tl.store(near + side, (keys * reach).to(near.dtype.element_ty), mask=inside)
    tl.store(asked + side, (queries * reach).to(asked.dtype.element_ty), mask=inside)
    tl.store(fed + side, (keys * tl.exp(whole[None, :] - total)).to(fed.dtype.element_ty), mask=inside)
    place = (chunk * (BLOCK_L // 16) + block).to(tl.int64) * sum_b + head * sum_h + i
    tl.store(sums + place, whole, mask=i < key_size)


@triton.jit
def kda_pairs(
    near, asked, fed, left, sums, ends, beta, alikes, weights, chunks,
    key_size, beta_t, side_t, side_h, sum_b, sum_h, alike_t, alike_h, pair_t, pair_h,
    BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """16 tokens of a chunk and one value head: their products with the chunk's earlier ones.

    Then their sides are decayed from the chunk's first token (``near`` and ``asked``, in place) and to its last
    (``left``).
    """
    first = tl.program_id(0) * 16
    head = tl.program_id(1)
    chunk = tl.program_id(2)
    _, _, start, length = chunk_at(chunks, chunk)
    length = tl.minimum(length, BLOCK_L)
    if first >= length:
        return
    r = tl.arange(0, 16)
    i = tl.arange(0, BLOCK_K)
    own = first + r
    valid = own < length
    rows = i < key_size
    inside = valid[:, None] & rows[None, :]
    side = start * side_t + head * side_h
    place = side + own[:, None] * side_t + i[None, :]
    keys = tl.load(near + place, mask=inside, other=0.0)
    queries = tl.load(asked + place, mask=inside, other=0.0)
    amount = tl.load(beta + (start + own) * beta_t + head, mask=valid, other=0.0).to(tl.float32)
    alikes += start * alike_t + head * alike_h + own[:, None] * alike_t + r[None, :]
    weights += start * pair_t + head * pair_h + own[:, None] * pair_t + r[None, :]
    sums += (chunk * (BLOCK_L // 16)).to(tl.int64) * sum_b + head * sum_h + i
    before = tl.zeros((BLOCK_K,), tl.float32)
    for back in range(16, first + 16, 16):
        other = first - back
        given = tl.load(fed + side + (other + r)[:, None] * side_t + i[None, :], mask=rows[None, :], other=0.0)
        across = tl.trans((given.to(tl.float32) * tl.exp(before)[None, :]).to(OPERAND))
        alike = tl.dot(keys.to(OPERAND), across, input_precision=PRECISION) * amount[:, None]
        seen = tl.dot(queries.to(OPERAND), across, input_precision=PRECISION)
        tl.store(alikes + other, alike, mask=valid[:, None])
        tl.store(weights + other, seen.to(weights.dtype.element_ty), mask=valid[:, None])
        before += tl.load(sums + other // 16 * sum_b, mask=rows, other=0.0)
    after = tl.zeros((BLOCK_K,), tl.float32)
    for other in range(first + 16, length, 16):
        after += tl.load(sums + other // 16 * sum_b, mask=rows, other=0.0)
    given = tl.load(fed + place, mask=inside, other=0.0).to(tl.float32) * tl.exp(after)[None, :]
    tl.store(left + place, given.to(left.dtype.element_ty), mask=inside)
    if first > 0:
        reach = tl.exp(before)[None, :]
        tl.store(near + place, (keys.to(tl.float32) * reach).to(near.dtype.element_ty), mask=inside)
        tl.store(asked + place, (queries.to(tl.float32) * reach).to(asked.dtype.element_ty), mask=inside)
    else:
        whole = after + tl.load(sums, mask=rows, other=0.0)
        tl.store(ends + chunk.to(tl.int64) * sum_b + head * sum_h + i, tl.exp(whole), mask=rows)


@triton.jit
def kda_inverses(
    alikes, inverses, chunks, alike_t, alike_h, pair_t, pair_h, BLOCK_L: tl.constexpr, EXACT: tl.constexpr
):
    """X of one chunk and value head, from its tokens' products with the ones before them."""
    _, _, start, length = chunk_at(chunks, tl.program_id(0))
    if length <= 0:
        return
    head = tl.program_id(1)
    alikes += start * alike_t + head * alike_h
    block = tl.arange(0, BLOCK_L // 16)[:, None, None] * 16
    r = tl.arange(0, 16)[None, :, None]
    c = tl.arange(0, 16)[None, None, :]
    near = tl.load(
        alikes + (block + r) * alike_t + block + c, mask=(block + r < length) & (r > c), other=0.0
    )  # 16 tokens and the ones before among them
    x = small_inverses(near, EXACT)
    t = tl.arange(0, BLOCK_L)[:, None]
    j = tl.arange(0, BLOCK_L)[None, :]
    far = tl.load(alikes + t * alike_t + j, mask=(t < length) & (t // 16 > j // 16), other=0.0)
    inverse = whole_inverse(x, far, BLOCK_L, EXACT)
    inverses += start * pair_t + head * pair_h
    tl.store(inverses + t * pair_t + j, inverse.to(inverses.dtype.element_ty), mask=t < length)


@triton.jit
def kda_states(
    v, beta, reached, left, ends, inverses, state, before, written, slots, fresh, query_start, firsts,
    key_size, width,
    v_t, v_h, beta_t, side_t, side_h, end_c, end_h, pair_t, pair_h, state_s, state_h, state_k, state_v,
    before_c, before_h, before_k, written_t, written_h,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_L: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state before each chunk of one request, what its tokens write, and the last state; BLOCK_V columns."""
    j = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    head = tl.program_id(1)
    request = tl.program_id(2)
    start = tl.load(query_start + request).to(tl.int64)
    length = (tl.load(query_start + request + 1) - start).to(tl.int32)
    slot = tl.load(slots + request).to(tl.int64)
    if (length <= 1) | (slot < 0):
        return
    columns = j < width
    t = tl.arange(0, BLOCK_L)
    i = tl.arange(0, BLOCK_K)
    rows = i < key_size
    inside = rows[:, None] & columns[None, :]
    known = tl.load(fresh + request) == 0
    state += slot * state_s + head * state_h
    page = i[:, None] * state_k + j[None, :] * state_v
    s = tl.load(state + page, mask=inside & known, other=0.0).to(tl.float32)
    v += start * v_t + head * v_h
    beta += start * beta_t + head
    reached += start * side_t + head * side_h
    left += start * side_t + head * side_h
    inverses += start * pair_t + head * pair_h
    written += start * written_t + head * written_h
    chunk = tl.load(firsts + request).to(tl.int64)
    ends += chunk * end_c + head * end_h
    before += chunk * before_c + head * before_h
    for first in range(0, length, BLOCK_L):
        valid = first + t < length
        tokens = valid[:, None] & columns[None, :]
        sides = valid[:, None] & rows[None, :]
        old = s.to(OPERAND)
        stored = inside & ((first > 0) | known)  # nobody reads the zeros before a fresh request
        tl.store(before + i[:, None] * before_k + j[None, :], old.to(before.dtype.element_ty), mask=stored)
        reach = tl.load(reached + t[:, None] * side_t + i[None, :], mask=sides, other=0.0).to(OPERAND)
        value = tl.load(v + t[:, None] * v_t + j[None, :], mask=tokens, other=0.0).to(tl.float32)
        inverse = tl.load(inverses + t[:, None] * pair_t + t[None, :], mask=valid[:, None], other=0.0).to(OPERAND)
        amount = tl.load(beta + t * beta_t, mask=valid, other=0.0).to(tl.float32)
        kept = tl.load(left + t[:, None] * side_t + i[None, :], mask=sides, other=0.0).to(OPERAND)
        decay = tl.load(ends + i, mask=rows, other=0.0)
        wanted = (value - tl.dot(reach, old, input_precision=PRECISION)) * amount[:, None]
        new = tl.dot(inverse, wanted.to(OPERAND), input_precision=PRECISION)
        tl.store(written + t[:, None] * written_t + j[None, :], new.to(written.dtype.element_ty), mask=tokens)
        s = tl.dot(tl.trans(kept), new.to(OPERAND), acc=s * decay[:, None], input_precision=PRECISION)
        v += BLOCK_L * v_t  # offsets inside a chunk stay 32-bit
        beta += BLOCK_L * beta_t
        reached += BLOCK_L * side_t
        left += BLOCK_L * side_t
        inverses += BLOCK_L * pair_t
        written += BLOCK_L * written_t
        ends += end_c
        before += before_c
    tl.store(state + page, s.to(state.dtype.element_ty), mask=inside)


@triton.jit
def kda_outputs(
    asked, weights, before, written, out, slots, fresh, chunks,
    key_size, width,
    side_t, side_h, pair_t, pair_h, before_c, before_h, before_k, written_t, written_h, out_t, out_h,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_L: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the state before one chunk and the chunk's own tokens give: one head, BLOCK_V columns."""
    chunk = tl.program_id(2)
    request, number, start, length = chunk_at(chunks, chunk)
    if length <= 0:
        return
    j = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    head = tl.program_id(1)
    columns = j < width
    t = tl.arange(0, BLOCK_L)
    valid = t < length
    tokens = valid[:, None] & columns[None, :]
    out += start * out_t + head * out_h
    if tl.load(slots + request) < 0:
        nothing = tl.zeros((BLOCK_L, BLOCK_V), out.dtype.element_ty)
        tl.store(out + t[:, None] * out_t + j[None, :], nothing, mask=tokens)
        return
    y = tl.zeros((BLOCK_L, BLOCK_V), tl.float32)
    if (number > 0) | (tl.load(fresh + request) == 0):
        i = tl.arange(0, BLOCK_K)
        rows = i < key_size
        before += chunk.to(tl.int64) * before_c + head * before_h
        s = tl.load(before + i[:, None] * before_k + j[None, :], mask=rows[:, None] & columns[None, :], other=0.0)
        asked += start * side_t + head * side_h
        query = tl.load(asked + t[:, None] * side_t + i[None, :], mask=valid[:, None] & rows[None, :], other=0.0)
        y = tl.dot(query.to(OPERAND), s.to(OPERAND), acc=y, input_precision=PRECISION)
    pairs = start * pair_t + head * pair_h + t[:, None] * pair_t + t[None, :]
    past = valid[:, None] & (t[:, None] // 16 >= t[None, :] // 16)  # what is later was not written
    weight = tl.load(weights + pairs, mask=past, other=0.0).to(OPERAND)
    written += start * written_t + head * written_h
    new = tl.load(written + t[:, None] * written_t + j[None, :], mask=tokens, other=0.0).to(OPERAND)
    y = tl.dot(weight, new, acc=y, input_precision=PRECISION)
    tl.store(out + t[:, None] * out_t + j[None, :], y.to(out.dtype.element_ty), mask=tokens)
