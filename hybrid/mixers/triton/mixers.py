"""The Triton implementation of :class:`MixerKernels`."""

from __future__ import annotations

import torch

from ..batch import StateBatch
from ..checks import check_conv, check_delta, check_mamba2, grouped
from ..interface import NO_LIMIT, MixerKernels
from . import conv, delta, mamba1, mamba2


class TritonMixers(MixerKernels):
    """A kernel for the decodes of a step and one for its longer requests; states are read and written in place."""

    name = "triton"
    capturable = True
    captures_ragged = True

    def causal_conv(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        state: torch.Tensor,
        batch: StateBatch,
        *,
        activation: str | None = None,
    ) -> torch.Tensor:
        """Taps are added in float32."""
        check_conv(x, weight, bias, state, batch, activation)
        return conv.causal_conv(x, weight, bias, state, batch, activation)

    def mamba2(
        self,
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        state: torch.Tensor,
        batch: StateBatch,
        *,
        D: torch.Tensor | None = None,
        dt_bias: torch.Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = NO_LIMIT,
        decode_dt_limit: tuple[float, float] | None = None,
        z: torch.Tensor | None = None,
        chunk_size: int = 64,
    ) -> torch.Tensor:
        """Products of 16-bit tokens run on tensor cores with float32 sums; ``chunk_size`` is the kernel's own."""
        check_mamba2(x, dt, A, B, C, state, batch, D, dt_bias, z)
        return mamba2.mamba2(
            x, dt, A, B, C, state, batch,
            D=D, dt_bias=dt_bias, dt_softplus=dt_softplus, z=z, limits=(*dt_limit, *(decode_dt_limit or dt_limit)),
        )  # fmt: skip

    def mamba1(
        self,
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        state: torch.Tensor,
        batch: StateBatch,
        *,
        D: torch.Tensor | None = None,
        z: torch.Tensor | None = None,
        dt_bias: torch.Tensor | None = None,
        dt_softplus: bool = False,
    ) -> torch.Tensor:
        """One kernel for requests of any length."""
        B, C, state = grouped(x, dt, A, B, C, state, batch, z)
        return mamba1.mamba1(x, dt, A, B, C, state, batch, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus)

    def gated_delta(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        state: torch.Tensor,
        batch: StateBatch,
        *,
        l2norm: bool = True,
        scale: float | None = None,
    ) -> torch.Tensor:
        """Chunks of 64 tokens (16 in float32)."""
        check_delta(q, k, v, g, beta, state, batch)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return delta.delta(q, k, v, g, beta, state, batch, l2norm=l2norm, scale=scale)

    def kda(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        state: torch.Tensor,
        batch: StateBatch,
        *,
        l2norm: bool = True,
        scale: float | None = None,
    ) -> torch.Tensor:
        """Chunks of 64 tokens (16 in float32)."""
        check_delta(q, k, v, g, beta, state, batch)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return delta.delta(q, k, v, g, beta, state, batch, l2norm=l2norm, scale=scale)
