"""Launches of the convolution kernels."""

from __future__ import annotations

import torch

from ..batch import StateBatch
from .chunks import chunk_table
from .kernels.conv import conv_chunk, conv_step
from .tiles import power_of_two

_TOKENS = 32
"""Tokens of a tile; more than any kernel is wide."""


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
    block = 128
    constants = {
        "W": columns,
        "W_PADDED": power_of_two(columns),
        "K": kernel,
        "BIAS": bias is not None,
        "SILU": activation == "silu",
        "BLOCK_C": block,
    }
    tensors = (x, weight, bias, state, out, batch.slots, batch.fresh, batch.query_start)
    strides = (x.stride(0), *weight.stride(), *state.stride(), out.stride(0))
    across = -(-channels // block)
    if batch.num_requests:
        conv_step[(across, batch.num_requests)](
            *tensors, channels, *strides, **constants, PACKED=batch.decode_only, num_warps=4
        )
    if batch.max_query_len > 1:
        chunks = chunk_table(batch, _TOKENS, x.shape[0])
        conv_chunk[(chunks.shape[0], across)](
            *tensors, chunks, batch.num_requests, channels, *strides, **constants, BLOCK_T=_TOKENS, num_warps=4
        )
    return out
