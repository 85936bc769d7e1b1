"""Launches of the kernels of Kimi delta attention for requests of several tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..batch import StateBatch
from .chunks import chunk_table
from .kernels.kda import kda_inverses, kda_outputs, kda_pairs, kda_sides, kda_states
from .tiles import Tile, inversion, power_of_two, products

_STRONGEST = {torch.float16: -8.0}
"""The sum of 16 log decays up to which tokens are compared by products, where exp of it has to fit float16."""
_STRONGEST_WIDE = -60.0
"""The same for dtypes with float32's range."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KdaTiles:
    """Programs of the five kernels; ``chunk`` tokens are taken at once."""

    chunk: int
    sides: Tile
    pairs: Tile
    inverses: Tile
    states: Tile
    """``rows`` of V."""
    outputs: Tile
    """``rows`` of V."""


def default_tiles(width: int, dtype: torch.dtype) -> KdaTiles:
    """What shapes and dtypes call for."""
    rows = power_of_two(width, 16)
    if dtype == torch.float32:
        tile = Tile(rows=min(32, rows))
        return KdaTiles(
            chunk=16, sides=Tile(rows=0), pairs=Tile(rows=0), inverses=Tile(rows=0), states=tile, outputs=tile
        )
    return KdaTiles(
        chunk=64,
        sides=Tile(rows=0, warps=2, registers=168),
        pairs=Tile(rows=0, warps=1),
        inverses=Tile(rows=0, warps=2),
        states=Tile(rows=min(64, rows), warps=4, stages=2),
        outputs=Tile(rows=min(128, rows), warps=4),
    )


def kda_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    batch: StateBatch,
    out: torch.Tensor,
    *,
    l2norm: bool,
    scale: float,
    tiles: KdaTiles | None = None,
) -> None:
    """Outputs of the requests with several tokens into ``out`` (T, H, Dv), and their states into their pages."""
    tokens, heads, width = v.shape
    key_heads, size = k.shape[1:]
    tiles = tiles or default_tiles(width, v.dtype)
    length = tiles.chunk
    chunks, firsts = chunk_table(batch, length, tokens)
    count = chunks.shape[0]
    sides = v.new_empty(3, tokens, heads, size)
    near, left, asked = sides
    fed = out if width == size else v.new_empty(tokens, heads, size)  # used up before outputs are written
    alikes = torch.empty(tokens, heads, length, dtype=torch.float32, device=v.device)
    pairs = v.new_empty(2, tokens, heads, length)
    inverses, weights = pairs
    sums, ends = (
        torch.empty(rows, heads, size, dtype=torch.float32, device=v.device) for rows in (count * length // 16, count)
    )
    before = v.new_empty(count, heads, size, width)
    written = v.new_empty(tokens, heads, width)
    blocks = {"BLOCK_K": power_of_two(size, 16), "BLOCK_L": length, **products(v.dtype)}
    shapes = (*sides.stride()[1:3], *ends.stride()[:2], *alikes.stride()[:2], *pairs.stride()[1:3])
    kda_sides[(length // 16, heads, count)](
        q, k, g, beta, near, asked, fed, sums, alikes, weights, chunks,
        size, scale, _STRONGEST.get(v.dtype, _STRONGEST_WIDE),
        *q.stride()[:2], *k.stride()[:2], *g.stride()[:2], beta.stride(0), *shapes,
        HEADS_PER_KEY=heads // key_heads, NORMALISE=l2norm, **blocks, **tiles.sides.options(v.device),
    )  # fmt: skip
    kda_pairs[(length // 16, heads, count)](
        near, asked, fed, left, sums, ends, beta, alikes, weights, chunks, size, beta.stride(0), *shapes,
        **blocks, **tiles.pairs.options(v.device),
    )  # fmt: skip
    kda_inverses[(count, heads)](
        alikes, inverses, chunks, *alikes.stride()[:2], *pairs.stride()[1:3], BLOCK_L=length,
        EXACT=inversion(v.dtype), **tiles.inverses.options(v.device),
    )  # fmt: skip
    tile, ragged = tiles.states, batch.first_ragged
    longer = tuple(part[ragged:] for part in (batch.slots, batch.fresh, batch.query_start, firsts))
    kda_states[(-(-width // tile.rows), heads, batch.num_requests - ragged)](
        v, beta, near, left, ends, inverses, state, before, written, *longer, size, width,
        *v.stride()[:2], beta.stride(0), *sides.stride()[1:3], *ends.stride()[:2], *pairs.stride()[1:3],
        *state.stride(), *before.stride()[:3], *written.stride()[:2], **blocks,
        BLOCK_V=tile.rows, **tile.options(v.device),
    )  # fmt: skip
    tile = tiles.outputs
    kda_outputs[(-(-width // tile.rows), heads, count)](
        asked, weights, before, written, out, batch.slots, batch.fresh, chunks, size, width,
        *sides.stride()[1:3], *pairs.stride()[1:3], *before.stride()[:3], *written.stride()[:2], *out.stride()[:2],
        **blocks, BLOCK_V=tile.rows, **tile.options(v.device),
    )  # fmt: skip
