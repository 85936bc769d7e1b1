"""Pages into one run of tokens."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gather_pages(
    source,
    other,
    block_stride,
    token_stride,
    head_stride,
    other_block_stride,
    other_token_stride,
    other_head_stride,
    table,
    table_stride,
    chunks,
    num_chunks,
    out,
    other_out,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    OTHER_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """K and V pages of some requests as one run of tokens (tokens, H, D); past a request's end the run is zero.

    ``chunks`` (3, num_chunks): the request of each CHUNK tokens, where in the request they start, and its length.
    """
    program = tl.program_id(0)
    head = tl.program_id(1)
    chunk = program // (CHUNK // TOKENS)
    request = tl.load(chunks + chunk).to(tl.int64)
    start = tl.load(chunks + num_chunks + chunk)
    length = tl.load(chunks + 2 * num_chunks + chunk)
    at = program % (CHUNK // TOKENS) * TOKENS + tl.arange(0, TOKENS)
    place = start + at
    inside = place < length
    block = tl.load(table + request * table_stride + place // BLOCK, mask=inside, other=0).to(tl.int64)
    run = (chunk.to(tl.int64) * CHUNK + at) * HEADS + head
    width = tl.arange(0, WIDTH)
    if tl.program_id(2) == 0:
        offset = block * block_stride + (place % BLOCK) * token_stride + head * head_stride
        here = inside[:, None] & (width < SIZE)[None, :]
        values = tl.load(source + offset[:, None] + width[None, :], mask=here, other=0.0)
        tl.store(out + (run * SIZE)[:, None] + width[None, :], values, mask=(width < SIZE)[None, :])
    else:
        offset = block * other_block_stride + (place % BLOCK) * other_token_stride + head * other_head_stride
        here = inside[:, None] & (width < OTHER_SIZE)[None, :]
        values = tl.load(other + offset[:, None] + width[None, :], mask=here, other=0.0)
        tl.store(other_out + (run * OTHER_SIZE)[:, None] + width[None, :], values, mask=(width < OTHER_SIZE)[None, :])
