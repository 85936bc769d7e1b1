"""Linear layers that share their input, as one operator: few tokens take one kernel, many take a product each."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch.nn import functional

MAX_WEIGHTS = 4
"""Matrices of one launch."""
_DTYPES = (torch.bfloat16, torch.float16)


def linears(x: torch.Tensor, weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """(..., K) through each of ``weights`` (N, K), to (..., N)."""
    rows = x.reshape(-1, x.shape[-1])
    outputs = _by_kernel(rows, weights)
    if outputs is None:
        return [functional.linear(x, weight) for weight in weights]
    return [output.view(*x.shape[:-1], -1) for output in outputs]


def like_linears(x: torch.Tensor, weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """Their shapes."""
    return [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]


def linear_add(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """``residual + x W``."""
    rows, added = x.reshape(-1, x.shape[-1]), residual.reshape(-1, residual.shape[-1])
    outputs = _by_kernel(rows, [weight], added) if rows.shape[0] == 1 and added.shape[0] == 1 else None
    if outputs is None:
        return residual + functional.linear(x, weight)
    return outputs[0].view(residual.shape)


def like_linear_add(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """Its shape."""
    return residual.new_empty(residual.shape)


def _by_kernel(
    x: torch.Tensor, weights: list[torch.Tensor], residual: torch.Tensor | None = None
) -> list[torch.Tensor] | None:
    if not _suits(x, weights):
        return None
    from . import linear_kernels

    tiles = linear_kernels.tiles_for(x.shape[0], sum(weight.shape[0] for weight in weights), x.shape[1])
    return None if tiles is None else linear_kernels.launch(x, weights, tiles, residual)


def _suits(x: torch.Tensor, weights: list[torch.Tensor]) -> bool:
    """Whether kernels could read these."""
    plain = all(weight.is_contiguous() and weight.dtype == x.dtype for weight in weights) and x.stride(-1) == 1
    return plain and x.device.type == "cuda" and x.dtype in _DTYPES and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
