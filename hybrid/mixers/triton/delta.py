"""Launches of the delta-rule kernels."""

from __future__ import annotations

import torch

from ..batch import StateBatch
from .chunks import chunk_table
from .kernels.delta import delta_prepare, delta_scan, delta_step
from .tiles import Tile, delta_tile, power_of_two, products, step_tile


def delta(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    batch: StateBatch,
    *,
    l2norm: bool,
    scale: float,
    tiles: tuple[Tile, Tile] | None = None,
) -> torch.Tensor:
    """See :meth:`MixerKernels.gated_delta`, and :meth:`MixerKernels.kda` where ``g`` has three axes."""
    heads, width = v.shape[1:]
    key_heads, size = k.shape[1:]
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    channels = g.dim() == 3
    step, scan = tiles or (step_tile(width, size, state.element_size()), delta_tile(width, v.dtype, channels))
    where = (batch.slots, batch.fresh, batch.query_start)
    sides = (*q.stride()[:2], *k.stride()[:2])
    decays = (*g.stride()[:2], beta.stride(0))
    pages = (*state.stride(), *out.stride()[:2])
    constants = {"HEADS_PER_KEY": heads // key_heads, "CHANNELS": channels, "NORMALISE": l2norm}
    requests = batch.num_requests
    if requests:
        delta_step[(-(-width // step.rows), heads, requests)](
            q, k, v, g, beta, state, out, *where, size, width, scale, *sides, *v.stride()[:2], *decays, *pages,
            **constants, PACKED=batch.decode_only, BLOCK_K=power_of_two(size), BLOCK_V=step.rows,
            num_warps=step.warps,
        )  # fmt: skip
    if batch.max_query_len > 1:
        tokens = v.shape[0]
        chunks = chunk_table(batch, scan.tokens, tokens)
        pairs = torch.empty(2, tokens, heads, scan.tokens, dtype=v.dtype, device=v.device)
        lines = torch.empty(3, heads, tokens, dtype=torch.float32, device=v.device)
        blocks = {"BLOCK_K": power_of_two(size, 16), "BLOCK_L": scan.tokens}
        delta_prepare[(chunks.shape[0], heads)](
            q, k, g, beta, pairs[0], pairs[1], lines[0], lines[1:], batch.query_start, chunks,
            requests, size, tokens, scale, *sides, *decays, *pairs.stride()[1:3],
            **constants, **blocks, **products(v.dtype), EXACT="ieee" if v.dtype == torch.float32 else "tf32x3",
            num_warps=4,
        )  # fmt: skip
        delta_scan[(-(-width // scan.rows), heads, requests)](
            q, k, v, g, beta, pairs[0], pairs[1], lines[0], lines[1:], state, out, *where,
            size, width, tokens, scale, *sides, *v.stride()[:2], *decays, *pairs.stride()[1:3], *pages,
            **constants, **blocks, **products(v.dtype), BLOCK_V=scan.rows,
            num_warps=scan.warps, num_stages=scan.stages,
        )  # fmt: skip
    return out
