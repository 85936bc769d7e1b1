"""The reference implementation of :class:`MixerKernels`."""

from __future__ import annotations

import torch

from ..batch import StateBatch
from ..checks import check_conv, check_delta, check_mamba2, grouped
from ..interface import NO_LIMIT, MixerKernels
from . import conv, delta, ssm
from .alone import one_by_one


class ReferenceMixers(MixerKernels):
    """Eager torch operations: decodes together, longer requests one after the other.

    :param alone: every request by itself, so that its bits do not depend on the others of its step.
    """

    name = "reference"

    def __init__(self, *, alone: bool = False) -> None:
        self.alone = alone

    @one_by_one("x")
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
        """torch's conv1d over each request's inputs."""
        check_conv(x, weight, bias, state, batch, activation)
        return conv.causal_conv(x, weight, bias, state, batch, activation)

    @one_by_one("x", "dt", "B", "C", "z")
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
        """Chunks of ``chunk_size`` tokens."""
        check_mamba2(x, dt, A, B, C, state, batch, D, dt_bias, z)
        steps = ssm.TimeSteps(dt_bias, dt_softplus, dt_limit, decode_dt_limit or dt_limit)
        y = ssm.mamba2(x, dt, A, B, C, state, batch, steps=steps, chunk_size=chunk_size)
        return ssm.skip_and_gate(y, x, D, z, batch)

    @one_by_one("x", "dt", "B", "C", "z")
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
        """Token after token."""
        B, C, state = grouped(x, dt, A, B, C, state, batch, z)
        steps = ssm.TimeSteps(dt_bias, dt_softplus, NO_LIMIT, NO_LIMIT)
        y = ssm.mamba1(x, dt, A, B, C, state, batch, steps=steps)
        return ssm.skip_and_gate(y, x, D, z, batch)

    @one_by_one("q", "k", "v", "g", "beta")
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
        """KDA whose decay is the same in all channels."""
        check_delta(q, k, v, g, beta, state, batch)
        return _delta(q, k, v, g.float().unsqueeze(-1), beta, state, batch, l2norm, scale)

    @one_by_one("q", "k", "v", "g", "beta")
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
        """Chunks that solve one triangular system."""
        check_delta(q, k, v, g, beta, state, batch)
        return _delta(q, k, v, g.float(), beta, state, batch, l2norm, scale)


def _delta(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    batch: StateBatch,
    l2norm: bool,
    scale: float | None,
) -> torch.Tensor:
    repeats = v.shape[1] // k.shape[1]
    queries = delta.normalised(q, l2norm) * (q.shape[-1] ** -0.5 if scale is None else scale)
    keys = delta.normalised(k, l2norm)
    queries, keys = (side.repeat_interleave(repeats, dim=1) for side in (queries, keys))
    return delta.delta(queries, keys, v, g, beta, state, batch).to(v.dtype)
