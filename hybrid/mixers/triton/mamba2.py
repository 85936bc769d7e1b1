"""Launches of the mamba2 kernels."""

from __future__ import annotations

import torch

from ..batch import StateBatch
from .chunks import chunk_table
from .kernels.mamba2 import mamba2_decays, mamba2_scan, mamba2_step
from .tiles import Tile, power_of_two, products, scan_tile, step_tile

_HEADS = 8
"""Heads whose time steps a program prepares."""


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
    tiles: tuple[Tile, Tile] | None = None,
) -> torch.Tensor:
    """See :meth:`MixerKernels.mamba2`; ``limits`` are those of prefill and of decode, ``tiles`` of step and scan."""
    heads, width = x.shape[1:]
    groups, size = B.shape[1:]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    step, scan = tiles or (step_tile(width, size, state.element_size()), scan_tile(width, size, x.dtype))
    skips = (0, 0) if D is None else (D.stride(0), D.stride(1) if D.dim() == 2 else 0)
    gates = (0, 0) if z is None else z.stride()[:2]
    pages = (*state.stride(), *out.stride()[:2])
    sides = (*B.stride()[:2], *C.stride()[:2], *skips, *gates, *pages)
    where = (batch.slots, batch.fresh, batch.query_start)
    constants = {"HEADS_PER_GROUP": heads // groups, "HAS_D": D is not None, "HAS_Z": z is not None}
    times = {"HAS_BIAS": dt_bias is not None, "SOFTPLUS": dt_softplus}
    requests = batch.num_requests
    if requests:
        mamba2_step[(-(-width // step.rows), heads, requests)](
            x, dt, A, B, C, D, dt_bias, z, state, out, *where, width, size, *limits,
            *x.stride()[:2], dt.stride(0), *sides, **constants, **times,
            PACKED=batch.decode_only, BLOCK_P=step.rows, BLOCK_N=power_of_two(size), num_warps=step.warps,
        )  # fmt: skip
    if batch.max_query_len > 1:
        tokens = x.shape[0]
        chunks = chunk_table(batch, scan.tokens, tokens)
        steps, totals = torch.empty(2, heads, tokens, dtype=torch.float32, device=x.device)
        mamba2_decays[(chunks.shape[0], -(-heads // _HEADS))](
            dt, A, dt_bias, steps, totals, batch.query_start, chunks, requests, heads, tokens, *limits[:2],
            dt.stride(0), **times, BLOCK_H=_HEADS, BLOCK_L=scan.tokens, num_warps=4,
        )  # fmt: skip
        mamba2_scan[(-(-width // scan.rows), heads, requests)](
            x, B, C, D, z, steps, totals, state, out, *where, width, size, tokens,
            *x.stride()[:2], *sides, **constants, **products(x.dtype),
            BLOCK_P=scan.rows, BLOCK_N=power_of_two(size, 16), BLOCK_L=scan.tokens,
            num_warps=scan.warps, num_stages=scan.stages,
        )  # fmt: skip
    return out
