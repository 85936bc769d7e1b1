"""Launches of the convolution kernels."""

from __future__ import annotations

import torch

from ....early_launch import early_launch
from ..batch import StateBatch
from .chunks import chunk_table
from .kernels.conv import conv_chunk, conv_chunk_wide, conv_step
from .tiles import Tile, power_of_two

_TILES = Tile(rows=128, tokens=32, warps=1), Tile(rows=128, tokens=16, warps=1)
"""Channels (``rows``) and tokens of a program for many tokens and for few; how they are cut changes no bit."""
_MANY = 8192
"""Tokens in a step that are many."""
_WIDE = Tile(rows=128, tokens=16, warps=2)
"""The same for kernels of more than four columns; no fewer tokens than a kernel is wide."""
_STEP_CHANNELS = 256
"""Channels of one request that a program steps."""


def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor,
    batch: StateBatch,
    activation: str | None,
    *,
    tile: Tile | None = None,
) -> torch.Tensor:
    """See :meth:`MixerKernels.causal_conv`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    channels, kernel = weight.shape
    columns = state.shape[-1]
    constants = {
        "W": columns,
        "K": kernel,
        "BIAS": bias is not None,
        "SILU": activation == "silu",
    }
    tensors = (x, weight, bias, state, out, batch.slots, batch.fresh)
    strides = (x.stride(0), *weight.stride(), *state.stride(), out.stride(0))
    if batch.num_requests and batch.may_have_decodes:
        conv_step[(-(-channels // _STEP_CHANNELS), batch.num_requests)](
            *tensors, batch.query_start, channels, *strides, **constants,
            PACKED=batch.decode_only, BLOCK_C=_STEP_CHANNELS, num_warps=4, **early_launch(x.device),
        )  # fmt: skip
    if batch.max_query_len > 1:
        narrow = 2 <= kernel <= 4
        tile = tile or ((_TILES[0] if x.shape[0] >= _MANY else _TILES[1]) if narrow else _WIDE)
        length = max(tile.tokens, power_of_two(kernel))
        chunks, _ = chunk_table(batch, length, x.shape[0])
        (conv_chunk if narrow else conv_chunk_wide)[(chunks.shape[0], -(-channels // tile.rows))](
            *tensors, chunks, channels, *strides, **constants,
            BLOCK_T=length, BLOCK_C=tile.rows, **tile.options(x.device),
        )  # fmt: skip
    return out
