"""Launches of the mamba2 kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ....early_launch import early_launch
from ..batch import StateBatch
from .chunks import chunk_table
from .kernels.mamba2 import mamba2_decays, mamba2_outputs, mamba2_pairs, mamba2_states, mamba2_step
from .tiles import Tile, power_of_two, products, step_tile

_HEADS = 8
"""Heads whose time steps a program prepares."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba2Tiles:
    """Programs of the five kernels; ``chunk`` tokens are taken at once."""

    step: Tile
    chunk: int
    states: Tile
    """``rows`` of P, ``tokens`` of N."""
    outputs: Tile
    """``rows`` of P, ``tokens`` of a chunk."""
    earlier: int
    """Tokens before, whose outputs are added at once."""
    inner: int
    """Part of N that products over it take at once."""


def default_tiles(width: int, size: int, dtype: torch.dtype, state_bytes: int) -> Mamba2Tiles:
    """What shapes and dtypes call for."""
    step = step_tile(width, size, state_bytes)
    rows, columns = power_of_two(width, 16), power_of_two(size, 16)
    wide = min(128, max(rows, 64))
    if dtype == torch.float32:
        tile = Tile(rows=min(32, rows), tokens=32)
        return Mamba2Tiles(step=step, chunk=32, states=tile, outputs=tile, earlier=32, inner=min(32, columns))
    return Mamba2Tiles(
        step=step,
        chunk=128,
        states=Tile(rows=64, tokens=min(128, columns), warps=4, stages=2),
        outputs=Tile(rows=wide, tokens=64, warps=4, stages=3, registers=128 if wide == 64 else 168),
        earlier=32,
        inner=min(64, columns),
    )


def mamba2(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor,
    batch: StateBatch,
    *,
    D: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    dt_softplus: bool,
    limits: tuple[float, float, float, float],
    z: torch.Tensor | None,
    tiles: Mamba2Tiles | None = None,
) -> torch.Tensor:
    """See :meth:`MixerKernels.mamba2`; ``limits`` are those of prefill and of decode."""
    heads, width = x.shape[1:]
    groups, size = B.shape[1:]
    tiles = tiles or default_tiles(width, size, x.dtype, state.element_size())
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not batch.num_requests:
        return out
    skips = (0, 0) if D is None else (D.stride(0), D.stride(1) if D.dim() == 2 else 0)
    gates = (0, 0) if z is None else z.stride()[:2]
    where = (batch.slots, batch.fresh, batch.query_start)
    shared = {"HEADS_PER_GROUP": heads // groups}
    extras = {"HAS_D": D is not None, "HAS_Z": z is not None}
    times = {"HAS_BIAS": dt_bias is not None, "SOFTPLUS": dt_softplus}
    step = tiles.step
    if batch.may_have_decodes:
        mamba2_step[(-(-width // step.rows), heads, batch.num_requests)](
            x, dt, A, B, C, D, dt_bias, z, state, out, *where, width, size, *limits,
            *x.stride()[:2], dt.stride(0), *B.stride()[:2], *C.stride()[:2], *skips, *gates, *state.stride(),
            *out.stride()[:2], **shared, **extras, **times,
            PACKED=batch.decode_only, BLOCK_P=step.rows, BLOCK_N=power_of_two(size), num_warps=step.warps,
            **early_launch(x.device),
        )  # fmt: skip
    if batch.max_query_len <= 1:
        return out
    tokens, length = x.shape[0], tiles.chunk
    chunks, firsts = chunk_table(batch, length, tokens)
    count = chunks.shape[0]
    steps, totals = torch.empty(2, heads, tokens, dtype=torch.float32, device=x.device)
    pairs = torch.empty(tokens, groups, length, dtype=torch.float32, device=x.device)
    before = torch.empty(count, heads, size, width, dtype=x.dtype, device=x.device)
    mamba2_decays[(count, -(-heads // _HEADS))](
        dt, A, dt_bias, steps, totals, chunks, heads, tokens, *limits[:2],
        dt.stride(0), **times, BLOCK_H=_HEADS, BLOCK_L=length, num_warps=4,
    )  # fmt: skip
    mamba2_pairs[(count, groups)](
        B, C, pairs, chunks, size,
        *B.stride()[:2], *C.stride()[:2], *pairs.stride()[:2],
        BLOCK_N=tiles.inner, BLOCK_L=length, **products(x.dtype), num_warps=8 if length > 64 else 4,
    )  # fmt: skip
    tile, ragged = tiles.states, batch.first_ragged
    longer = tuple(part[ragged:] for part in (*where, firsts))
    mamba2_states[(-(-width // tile.rows) * -(-size // tile.tokens), heads, batch.num_requests - ragged)](
        x, B, steps, totals, state, before, *longer, width, size, tokens,
        *x.stride()[:2], *B.stride()[:2], *state.stride(), *before.stride()[:3], **shared,
        BLOCK_P=tile.rows, BLOCK_N=tile.tokens, BLOCK_L=length, **products(x.dtype),
        **tile.options(x.device),
    )  # fmt: skip
    tile = tiles.outputs
    mamba2_outputs[(-(-width // tile.rows) * -(-length // tile.tokens), heads, count)](
        x, C, D, z, steps, totals, pairs, before, out, batch.slots, batch.fresh, chunks, width, size, tokens,
        *x.stride()[:2], *C.stride()[:2], *pairs.stride()[:2], *skips, *gates, *before.stride()[:3], *out.stride()[:2],
        **shared, **extras, BLOCK_P=tile.rows, BLOCK_N=tiles.inner, BLOCK_T=tile.tokens, BLOCK_J=tiles.earlier,
        BLOCK_L=length, **products(x.dtype), **tile.options(x.device),
    )  # fmt: skip
    return out
