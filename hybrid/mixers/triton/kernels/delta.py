"""Delta rules: one step, with one decay per head (gated delta net) or per key channel (KDA); chunks of the former.

With G the log decays summed in a chunk, a longer request is, chunk by chunk: written = X beta (v - exp(G) k S),
out = exp(G) q S + W written, S = exp(G_last) S + (exp(G_last - G) k)' written. ``delta_prepare`` makes X and W of all
chunks at once; ``delta_states`` walks each request with its state in registers and leaves the state before every chunk
and what is written; ``delta_outputs`` does the rest for all chunks at once.
"""

import triton
import triton.language as tl

from .numerics import chunk_at


@triton.jit
def inverse_length(x):
    """One over the length of each row."""
    return 1.0 / tl.sqrt(tl.sum(x * x, 1) + 1e-6)


@triton.jit
def merged(x, a, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """Inverses (B, 16, 16) of twice the size from those of the SIZE x SIZE blocks on the diagonal."""
    r = tl.arange(0, 16)[None, :, None]
    c = tl.arange(0, 16)[None, None, :]
    below = tl.where((r // (2 * SIZE) == c // (2 * SIZE)) & (r // SIZE > c // SIZE), a, 0.0)
    return x - tl.dot(tl.dot(x, below, input_precision=PRECISION), x, input_precision=PRECISION)


@triton.jit
def small_inverses(a, PRECISION: tl.constexpr):
    """(I + a)^-1 of each strictly lower triangular a of (B, 16, 16): single rows, then blocks merged two by two."""
    r = tl.arange(0, 16)[None, :, None]
    c = tl.arange(0, 16)[None, None, :]
    x = tl.where(r == c, 1.0, tl.where((r // 2 == c // 2) & (r > c), -a, 0.0))
    x = merged(x, a, 2, PRECISION)
    x = merged(x, a, 4, PRECISION)
    return merged(x, a, 8, PRECISION)


@triton.jit
def whole_inverse(x, a, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """(I + a)^-1 of a strictly lower triangular a, from the inverses (SIZE / 16, 16, 16) on its diagonal."""
    BLOCKS: tl.constexpr = SIZE // 16
    own = (tl.arange(0, BLOCKS)[:, None] == tl.arange(0, BLOCKS)[None, :])[:, None, :, None]
    x = tl.reshape(tl.where(own, x[:, :, None, :], 0.0), (SIZE, SIZE))
    r = tl.arange(0, SIZE)[:, None]
    c = tl.arange(0, SIZE)[None, :]
    if SIZE > 16:
        below = tl.where((r // 32 == c // 32) & (r // 16 > c // 16), a, 0.0)
        x -= tl.dot(tl.dot(x, below, input_precision=PRECISION), x, input_precision=PRECISION)
    if SIZE > 32:
        below = tl.where((r // 64 == c // 64) & (r // 32 > c // 32), a, 0.0)
        x -= tl.dot(tl.dot(x, below, input_precision=PRECISION), x, input_precision=PRECISION)
    return x


@triton.jit
def unit_lower_inverse(a, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """(I + a)^-1 of a strictly lower triangular a."""
    BLOCKS: tl.constexpr = SIZE // 16
    own = (tl.arange(0, BLOCKS)[:, None] == tl.arange(0, BLOCKS)[None, :])[:, None, :, None]
    diagonal = tl.sum(tl.where(own, tl.reshape(a, (BLOCKS, 16, BLOCKS, 16)), 0.0), 2)  # (BLOCKS, 16, 16)
    return whole_inverse(small_inverses(diagonal, PRECISION), a, SIZE, PRECISION)


@triton.jit
def delta_step(
    q, k, v, g, beta, state, out, slots, fresh, query_start,
    key_size, width, scale,
    q_t, q_h, k_t, k_h, v_t, v_h, g_t, g_h, beta_t, state_s, state_h, state_k, state_v, out_t, out_h,
    HEADS_PER_KEY: tl.constexpr, CHANNELS: tl.constexpr, NORMALISE: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One token of one request, one value head, BLOCK_V columns of its state."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    j = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    head = tl.program_id(1)
    request = tl.program_id(2)
    token = request
    if not PACKED:
        token = tl.load(query_start + request)
        if tl.load(query_start + request + 1) - token != 1:
            return
    token = token.to(tl.int64)
    slot = tl.load(slots + request).to(tl.int64)
    columns = j < width
    target = out + token * out_t + head * out_h + j
    if slot < 0:
        tl.store(target, tl.zeros((BLOCK_V,), out.dtype.element_ty), mask=columns)
        return
    i = tl.arange(0, BLOCK_K)
    rows = i < key_size
    inside = rows[:, None] & columns[None, :]
    known = tl.load(fresh + request) == 0
    page = state + slot * state_s + head * state_h + i[:, None] * state_k + j[None, :] * state_v
    s = tl.load(page, mask=inside & known, other=0.0).to(tl.float32)
    key_head = head // HEADS_PER_KEY
    query = tl.load(q + token * q_t + key_head * q_h + i, mask=rows, other=0.0).to(tl.float32)
    key = tl.load(k + token * k_t + key_head * k_h + i, mask=rows, other=0.0).to(tl.float32)
    if NORMALISE:
        query *= 1.0 / tl.sqrt(tl.sum(query * query, 0) + 1e-6)
        key *= 1.0 / tl.sqrt(tl.sum(key * key, 0) + 1e-6)
    if CHANNELS:
        decay = tl.exp(tl.load(g + token * g_t + head * g_h + i, mask=rows, other=0.0).to(tl.float32))
        s = s * decay[:, None]
    else:
        s = s * tl.exp(tl.load(g + token * g_t + head * g_h).to(tl.float32))
    value = tl.load(v + token * v_t + head * v_h + j, mask=columns, other=0.0).to(tl.float32)
    weight = tl.load(beta + token * beta_t + head).to(tl.float32)
    written = (value - tl.sum(s * key[:, None], 0)) * weight
    s += key[:, None] * written[None, :]
    tl.store(page, s.to(state.dtype.element_ty), mask=inside)
    y = tl.sum(s * query[:, None], 0) * scale
    tl.store(target, y.to(out.dtype.element_ty), mask=columns)


@triton.jit(do_not_specialize=["num_tokens"])
def delta_prepare(
    q, k, g, beta, inverses, weights, totals, lengths, chunks,
    key_size, num_tokens, scale,
    q_t, q_h, k_t, k_h, g_t, g_h, beta_t, pair_t, pair_h,
    HEADS_PER_KEY: tl.constexpr, NORMALISE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_L: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """X and W of one chunk and value head, (T, Hv, L) each; G and both inverse lengths."""
    _, _, start, length = chunk_at(chunks, tl.program_id(0))
    if length <= 0:
        return
    head = tl.program_id(1)
    t = tl.arange(0, BLOCK_L)
    i = tl.arange(0, BLOCK_K)
    valid = t < length
    rows = i < key_size
    inside = valid[:, None] & rows[None, :]
    key_head = head // HEADS_PER_KEY
    query = tl.load(q + start * q_t + key_head * q_h + t[:, None] * q_t + i[None, :], mask=inside, other=0.0)
    key = tl.load(k + start * k_t + key_head * k_h + t[:, None] * k_t + i[None, :], mask=inside, other=0.0)
    amount = tl.load(beta + (start + t) * beta_t + head, mask=valid, other=0.0).to(tl.float32)
    q_length = tl.full((BLOCK_L,), scale, tl.float32)
    k_length = tl.full((BLOCK_L,), 1.0, tl.float32)
    if NORMALISE:
        q_length *= inverse_length(query.to(tl.float32))
        k_length *= inverse_length(key.to(tl.float32))
    total = tl.cumsum(tl.load(g + (start + t) * g_t + head * g_h, mask=valid, other=0.0).to(tl.float32), 0)
    gap = tl.exp(tl.minimum(total[:, None] - total[None, :], 0.0)) * k_length[None, :]
    across = tl.trans(key.to(OPERAND))
    seen = tl.dot(query.to(OPERAND), across, input_precision=PRECISION) * gap * q_length[:, None]
    alike = tl.dot(key.to(OPERAND), across, input_precision=PRECISION) * gap * k_length[:, None]
    line = head.to(tl.int64) * num_tokens + start + t
    tl.store(totals + line, total, mask=valid)
    tl.store(lengths + line, k_length, mask=valid)
    tl.store(lengths + tl.num_programs(1).to(tl.int64) * num_tokens + line, q_length, mask=valid)
    pairs = (start + t[:, None]) * pair_t + head * pair_h + t[None, :]
    seen = tl.where(t[:, None] >= t[None, :], seen, 0.0)
    tl.store(weights + pairs, seen.to(weights.dtype.element_ty), mask=valid[:, None])
    alike = tl.where(t[:, None] > t[None, :], alike * amount[:, None], 0.0)
    inverse = unit_lower_inverse(alike, BLOCK_L, EXACT)
    tl.store(inverses + pairs, inverse.to(inverses.dtype.element_ty), mask=valid[:, None])


@triton.jit(do_not_specialize=["num_tokens"])
def delta_states(
    k, v, beta, inverses, totals, lengths, state, before, written, slots, fresh, query_start, firsts,
    key_size, width, num_tokens,
    k_t, k_h, v_t, v_h, beta_t, pair_t, pair_h, state_s, state_h, state_k, state_v,
    before_c, before_h, before_k, written_t, written_h,
    HEADS_PER_KEY: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_L: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One decay per head: the state before each chunk of one request, what its tokens write, and the last state."""
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
    k += start * k_t + head // HEADS_PER_KEY * k_h
    v += start * v_t + head * v_h
    beta += start * beta_t + head
    inverses += start * pair_t + head * pair_h
    written += start * written_t + head * written_h
    totals += head.to(tl.int64) * num_tokens + start
    lengths += head.to(tl.int64) * num_tokens + start
    before += tl.load(firsts + request).to(tl.int64) * before_c + head * before_h
    for first in range(0, length, BLOCK_L):
        valid = first + t < length
        tokens = valid[:, None] & columns[None, :]
        old = s.to(OPERAND)
        stored = inside & ((first > 0) | known)  # nobody reads the zeros before a fresh request
        tl.store(before + i[:, None] * before_k + j[None, :], old.to(before.dtype.element_ty), mask=stored)
        key = tl.load(k + t[:, None] * k_t + i[None, :], mask=valid[:, None] & rows[None, :], other=0.0).to(OPERAND)
        value = tl.load(v + t[:, None] * v_t + j[None, :], mask=tokens, other=0.0).to(tl.float32)
        inverse = tl.load(inverses + t[:, None] * pair_t + t[None, :], mask=valid[:, None], other=0.0).to(OPERAND)
        amount = tl.load(beta + t * beta_t, mask=valid, other=0.0).to(tl.float32)
        total = tl.load(totals + t, mask=valid, other=0.0)
        last = tl.load(totals + tl.minimum(BLOCK_L, length - first) - 1)
        k_length = tl.load(lengths + t, mask=valid, other=0.0)
        seen = tl.dot(key, old, input_precision=PRECISION) * (tl.exp(total) * k_length)[:, None]
        wanted = (value - seen) * amount[:, None]
        new = tl.dot(inverse, wanted.to(OPERAND), input_precision=PRECISION)
        tl.store(written + t[:, None] * written_t + j[None, :], new.to(written.dtype.element_ty), mask=tokens)
        left = new * (tl.exp(last - total) * k_length)[:, None]
        s = tl.dot(tl.trans(key), left.to(OPERAND), acc=s * tl.exp(last), input_precision=PRECISION)
        k += BLOCK_L * k_t  # offsets inside a chunk stay 32-bit
        v += BLOCK_L * v_t
        beta += BLOCK_L * beta_t
        inverses += BLOCK_L * pair_t
        written += BLOCK_L * written_t
        totals += BLOCK_L
        lengths += BLOCK_L
        before += before_c
    tl.store(state + page, s.to(state.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def delta_outputs(
    q, weights, totals, lengths, before, written, out, slots, fresh, chunks,
    key_size, width, num_tokens,
    q_t, q_h, pair_t, pair_h, before_c, before_h, before_k, written_t, written_h, out_t, out_h,
    HEADS_PER_KEY: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_L: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One decay per head: one chunk, one value head, BLOCK_V columns."""
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
        q += start * q_t + head // HEADS_PER_KEY * q_h
        query = tl.load(q + t[:, None] * q_t + i[None, :], mask=valid[:, None] & rows[None, :], other=0.0)
        line = head.to(tl.int64) * num_tokens + start + t
        total = tl.load(totals + line, mask=valid, other=0.0)
        q_length = tl.load(lengths + tl.num_programs(1).to(tl.int64) * num_tokens + line, mask=valid, other=0.0)
        y = tl.dot(query.to(OPERAND), s.to(OPERAND), input_precision=PRECISION) * (tl.exp(total) * q_length)[:, None]
    pairs = start * pair_t + head * pair_h + t[:, None] * pair_t + t[None, :]
    weight = tl.load(weights + pairs, mask=valid[:, None], other=0.0).to(OPERAND)
    written += start * written_t + head * written_h
    new = tl.load(written + t[:, None] * written_t + j[None, :], mask=tokens, other=0.0).to(OPERAND)
    y = tl.dot(weight, new, acc=y, input_precision=PRECISION)
    tl.store(out + t[:, None] * out_t + j[None, :], y.to(out.dtype.element_ty), mask=tokens)
