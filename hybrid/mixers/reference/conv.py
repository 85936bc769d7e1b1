"""Causal depthwise convolution with torch's own conv1d, in the weight's dtype as transformers does it."""

from __future__ import annotations

import torch
from torch.nn import functional

from ..batch import StateBatch
from .pages import Rows, decodes, longer


def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor,
    batch: StateBatch,
    activation: str | None,
) -> torch.Tensor:
    """See :meth:`MixerKernels.causal_conv`."""
    out = torch.zeros_like(x, memory_format=torch.contiguous_format)
    rows = decodes(batch)
    if len(rows.tokens):
        out[rows.tokens] = _convolve(x[rows.tokens].unsqueeze(-1), weight, bias, state, rows, activation)[..., 0]
    for rows in longer(batch):
        tokens = x[rows.tokens].transpose(0, 1).unsqueeze(0)
        out[rows.tokens] = _convolve(tokens, weight, bias, state, rows, activation)[0].transpose(0, 1)
    return out


def _convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor,
    rows: Rows,
    activation: str | None,
) -> torch.Tensor:
    """(R, C, L) outputs of R requests with L tokens each; their pages get the newest inputs."""
    length, columns = x.shape[-1], state.shape[-1]
    inputs = torch.cat([rows.read(state).to(x.dtype), x], dim=-1)
    rows.write(state, inputs[..., inputs.shape[-1] - columns :])
    seen = inputs[..., inputs.shape[-1] - length - weight.shape[-1] + 1 :].to(weight.dtype)
    out = functional.conv1d(seen, weight.unsqueeze(1), bias, groups=weight.shape[0])
    if activation is not None:
        out = functional.silu(out)
    return out.to(x.dtype)
