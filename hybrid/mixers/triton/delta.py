"""Launches of the delta-rule kernels."""

from __future__ import annotations

import torch

from ....early_launch import early_launch
from ..batch import StateBatch
from .chunks import chunk_table
from .kda import KdaTiles, kda_prefill
from .kernels.delta import delta_outputs, delta_prepare, delta_states, delta_step
from .tiles import Tile, delta_tile, inversion, power_of_two, products, step_tile

_PREPARE = Tile(rows=0, warps=4, registers=168)
"""How a chunk is prepared."""
_OUTPUTS = Tile(rows=64, warps=4)
"""How its outputs are computed: ``rows`` of V."""


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
    kda_tiles: KdaTiles | None = None,
) -> torch.Tensor:
    """See :meth:`MixerKernels.gated_delta`, and :meth:`MixerKernels.kda` where ``g`` has three axes."""
    heads, width = v.shape[1:]
    key_heads, size = k.shape[1:]
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    channels = g.dim() == 3
    step, scan = tiles or (step_tile(width, size, state.element_size(), warps=2), delta_tile(width, v.dtype))
    if not batch.num_requests:
        return out
    where = (batch.slots, batch.fresh, batch.query_start)
    sides = (*q.stride()[:2], *k.stride()[:2])
    decays = (*g.stride()[:2], beta.stride(0))
    shared = {"HEADS_PER_KEY": heads // key_heads}
    if batch.may_have_decodes:
        delta_step[(-(-width // step.rows), heads, batch.num_requests)](
            q, k, v, g, beta, state, out, *where, size, width, scale, *sides, *v.stride()[:2], *decays,
            *state.stride(), *out.stride()[:2], **shared, CHANNELS=channels, NORMALISE=l2norm,
            PACKED=batch.decode_only, BLOCK_K=power_of_two(size), BLOCK_V=step.rows, num_warps=step.warps,
            **early_launch(v.device),
        )  # fmt: skip
    if batch.max_query_len <= 1:
        return out
    if channels:
        kda_prefill(q, k, v, g, beta, state, batch, out, l2norm=l2norm, scale=scale, tiles=kda_tiles)
        return out
    tokens, length = v.shape[0], scan.tokens
    chunks, firsts = chunk_table(batch, length, tokens)
    count = chunks.shape[0]
    pairs = torch.empty(2, tokens, heads, length, dtype=v.dtype, device=v.device)
    lines = torch.empty(3, heads, tokens, dtype=torch.float32, device=v.device)
    blocks = {"BLOCK_K": power_of_two(size, 16), "BLOCK_L": length, **products(v.dtype)}
    delta_prepare[(count, heads)](
        q, k, g, beta, pairs[0], pairs[1], lines[0], lines[1:], chunks,
        size, tokens, scale, *sides, *decays, *pairs.stride()[1:3],
        **shared, **blocks, NORMALISE=l2norm,
        EXACT=inversion(v.dtype), **_PREPARE.options(v.device),
    )  # fmt: skip
    options = {"BLOCK_V": scan.rows, **scan.options(v.device)}
    ragged = batch.first_ragged
    walks = (-(-width // scan.rows), heads, batch.num_requests - ragged)
    longer = tuple(part[ragged:] for part in (*where, firsts))
    before = torch.empty(count, heads, size, width, dtype=v.dtype, device=v.device)
    written = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    delta_states[walks](
        k, v, beta, pairs[0], lines[0], lines[1:], state, before, written, *longer, size, width, tokens,
        *k.stride()[:2], *v.stride()[:2], beta.stride(0), *pairs.stride()[1:3], *state.stride(),
        *before.stride()[:3], *written.stride()[:2], **shared, **blocks, **options,
    )  # fmt: skip
    rows = min(_OUTPUTS.rows, power_of_two(width, 16))
    delta_outputs[(-(-width // rows), heads, count)](
        q, pairs[1], lines[0], lines[1:], before, written, out, batch.slots, batch.fresh, chunks,
        size, width, tokens, *q.stride()[:2], *pairs.stride()[1:3], *before.stride()[:3], *written.stride()[:2],
        *out.stride()[:2], **shared, **blocks, BLOCK_V=rows, **_OUTPUTS.options(v.device),
    )  # fmt: skip
    return out
