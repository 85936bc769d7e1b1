"""What state mixers compute, whoever computes it. Shapes: T packed tokens of B requests; H heads.

Every method reads the state of request ``i`` from page ``batch.slots[i]`` of its ``state`` view, computes in float32,
writes the new state back to the same page in the state's dtype, and returns the outputs in the inputs' dtype. A
fresh request's page is written and never read; a request with slot -1 touches no page and its outputs are zeros.

Page views may have any strides (a page lies between other layers' pages); tokens may be slices of a wider projection,
as long as their last axis is contiguous.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from .batch import StateBatch

NO_LIMIT: tuple[float, float] = (0.0, float("inf"))
"""A time step that is not clamped."""


class MixerKernels(ABC):
    """One implementation of all mixers, for one device."""

    name: str
    capturable: bool = False
    """Whether steps with ``decode_only`` can run inside a CUDA graph: no waiting, shapes from B only."""
    captures_ragged: bool = False
    """Whether steps with ``num_ragged`` can, too: shapes from T, B and ``num_ragged`` only."""

    @abstractmethod
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
        """Depthwise convolution over each request's own tokens and the ones before them.

        :param x: (T, C).
        :param weight: (C, K); column K - 1 multiplies the token itself.
        :param bias: (C,).
        :param state: (num_slots, C, W): the last W inputs of each channel, newest last; W >= K - 1.
        :param activation: ``"silu"`` or ``None``.
        :return: (T, C), contiguous.
        """

    @abstractmethod
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
        """State-space duality: ``S = exp(dt A) S + dt x B``, ``y = S C + D x``, then ``y * silu(z)``.

        :param x: (T, H, P).
        :param dt: (T, H), before bias, softplus and clamp.
        :param A: (H,), negative.
        :param B: (T, G, N); a group serves H / G heads in a row.
        :param C: (T, G, N).
        :param state: (num_slots, H, P, N).
        :param D: (H,) or (H, P).
        :param dt_bias: (H,).
        :param dt_limit: clamp of the time step after softplus.
        :param decode_dt_limit: the clamp of a single token that continues a state, where the model's own decode
            differs from its prefill; ``None`` for the same.
        :param z: (T, H, P) gate.
        :param chunk_size: tokens that a plain implementation takes at once; kernels choose their own.
        :return: (T, H, P), contiguous.
        """

    @abstractmethod
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
        """Selective scan with a state per channel: ``s = exp(dt A) s + dt B x``, ``y = s C + D x``, ``y * silu(z)``.

        :param x: (T, I).
        :param dt: (T, I), before bias and softplus.
        :param A: (I, N), negative.
        :param B: (T, N), or (T, G, N) where a group serves I / G channels in a row.
        :param C: as B.
        :param state: (num_slots, I, N), or (num_slots, G, I / G, N).
        :param D: (I,).
        :param z: (T, I) gate.
        :param dt_bias: (I,).
        :return: (T, I), contiguous.
        """

    @abstractmethod
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
        """Gated delta rule: ``S = exp(g) S``, ``S = S + k (beta (v - k S))``, ``o = scale q S``.

        :param q: (T, Hk, Dk); a key head serves Hv / Hk value heads in a row.
        :param k: (T, Hk, Dk).
        :param v: (T, Hv, Dv).
        :param g: (T, Hv), logarithm of the decay, <= 0.
        :param beta: (T, Hv).
        :param state: (num_slots, Hv, Dk, Dv).
        :param l2norm: divide q and k by their lengths first (epsilon 1e-6 under the root).
        :param scale: of the queries, ``Dk ** -0.5`` unless given.
        :return: (T, Hv, Dv), contiguous.
        """

    @abstractmethod
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
        """Kimi delta attention: the gated delta rule with a decay per key channel.

        :param q: (T, H, Dk).
        :param k: (T, H, Dk).
        :param v: (T, H, Dv).
        :param g: (T, H, Dk), logarithm of the decay, <= 0.
        :param beta: (T, H).
        :param state: (num_slots, H, Dk, Dv).
        :param l2norm: as for :meth:`gated_delta`.
        :param scale: as for :meth:`gated_delta`.
        :return: (T, H, Dv), contiguous.
        """

    def lightning(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        slopes: torch.Tensor,
        state: torch.Tensor,
        batch: StateBatch,
        *,
        scale: float = 1.0,
    ) -> torch.Tensor:
        """Linear attention with a constant decay per head: ``S = exp(-slope) S + k v``, ``o = scale q S``.

        It is mamba2 with time steps of one and a group per head, over the transposed state.

        :param q: (T, H, Dk).
        :param k: (T, H, Dk).
        :param v: (T, H, Dv).
        :param slopes: (H,), >= 0.
        :param state: (num_slots, H, Dk, Dv).
        :return: (T, H, Dv), contiguous.
        """
        steps = torch.ones(v.shape[:2], dtype=torch.float32, device=v.device)
        queries = q if scale == 1.0 else (q.float() * scale).to(q.dtype)
        return self.mamba2(v, steps, -slopes.float(), k, queries, state.transpose(-1, -2), batch)
