"""Launches of the mamba1 kernel."""

from __future__ import annotations

import torch

from ....early_launch import early_launch
from ..batch import StateBatch
from .kernels.mamba1 import mamba1_scan
from .tiles import power_of_two


def mamba1(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor,
    batch: StateBatch,
    *,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    dt_softplus: bool,
) -> torch.Tensor:
    """See :meth:`MixerKernels.mamba1`; B and C are (T, G, N), ``state`` (num_slots, G, I / G, N)."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    groups, width, size = state.shape[1:]
    block = min(64, power_of_two(width))
    if batch.num_requests:
        mamba1_scan[(-(-width // block), groups, batch.num_requests)](
            x, dt, A, B, C, D, dt_bias, z, state, out, batch.slots, batch.fresh, batch.query_start, width, size,
            x.stride(0), dt.stride(0), *A.stride(), *B.stride()[:2], *C.stride()[:2],
            0 if z is None else z.stride(0), *state.stride(), out.stride(0),
            HAS_D=D is not None, HAS_BIAS=dt_bias is not None, HAS_Z=z is not None, SOFTPLUS=dt_softplus,
            PACKED=batch.decode_only, BLOCK_I=block, BLOCK_N=power_of_two(size), num_warps=2,
            **early_launch(x.device),
        )  # fmt: skip
    return out
