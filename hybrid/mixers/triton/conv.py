"""Launches of the convolution kernels."""

from __future__ import annotations

import torch

from ....early_launch import early_launch
from ..batch import StateBatch
from .chunks import chunk_table
from .kernels.conv import conv_chunk, conv_step
from .tiles import power_of_two

_TOKENS, _CHANNELS, _WARPS = 16, 64, 2
"""Tokens (no fewer than a kernel is wide) and channels of a tile, and its warps."""
_STEP_CHANNELS = 256
"""Channels of one request that a program steps."""


def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor,
    batch: StateBatch,
    activation: str | None,
) -> torch.Tensor:
    """See :meth:`MixerKernels.causal_conv`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    channels, kernel = weight.shape
    columns = state.shape[-1]
    constants = {
        "W": columns,
        "W_PADDED": power_of_two(columns),
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
        chunks, _ = chunk_table(batch, _TOKENS, x.shape[0])
        conv_chunk[(chunks.shape[0], -(-channels // _CHANNELS))](
            *tensors, chunks, channels, *strides, **constants,
            BLOCK_T=_TOKENS, BLOCK_C=_CHANNELS, num_warps=_WARPS,
        )  # fmt: skip
    return out
