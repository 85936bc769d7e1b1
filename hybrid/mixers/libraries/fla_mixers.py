"""flash-linear-attention between gathered and scattered states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from ..batch import StateBatch
from ..checks import check_conv, check_delta
from ..triton.mixers import TritonMixers
from .columns import padded_columns
from .longer import Longer, beside_decodes


class FlaMixers(TritonMixers):
    """Requests with several tokens go to the library; single tokens, and what it does not have, to Triton in place.

    Its autotuner times programs when a shape of heads first runs: seconds, once per process.
    """

    name = "fla"
    captures_ragged = False  # it is told on the host where each request begins

    def __init__(self, functions: Mapping[str, Callable[..., Any]]) -> None:
        self._functions = functions

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
        """The library keeps as many columns as the kernel is wide."""
        one_step = partial(super().causal_conv, x, weight, bias, state, activation=activation)
        if batch.max_query_len <= 1:
            return one_step(batch)
        check_conv(x, weight, bias, state, batch, activation)

        def longer(part: Longer) -> torch.Tensor:
            y, states = self._functions["causal_conv"](
                x=part.take(x), weight=weight, bias=bias, activation=activation, output_final_state=True,
                initial_state=padded_columns(part.read(state, x.dtype), weight.shape[-1], self.name),
                cu_seqlens=part.starts, cu_seqlens_cpu=part.starts_host,
            )  # fmt: skip
            part.write(state, states[..., weight.shape[-1] - state.shape[-1] :])
            outputs: torch.Tensor = y.squeeze(0)
            return outputs

        return beside_decodes(batch, longer, one_step)

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
        """Chunks of 64 tokens."""
        one_step = partial(super().gated_delta, q, k, v, g, beta, state, l2norm=l2norm, scale=scale)
        return self._delta("gated_delta", one_step, q, k, v, g, beta, state, batch, l2norm, scale)

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
        """Chunks of 64 tokens."""
        one_step = partial(super().kda, q, k, v, g, beta, state, l2norm=l2norm, scale=scale)
        return self._delta("kda", one_step, q, k, v, g, beta, state, batch, l2norm, scale)

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
        """Its linear attention with one constant decay per head."""
        one_step = partial(super().lightning, q, k, v, slopes, state, scale=scale)
        if batch.max_query_len <= 1:
            return one_step(batch)

        def longer(part: Longer) -> torch.Tensor:
            return self._packed("simple_gla", part, state, q, k, v, g_gamma=-slopes.float(), scale=scale)

        return beside_decodes(batch, longer, one_step)

    def _delta(
        self,
        function: str,
        one_step: Callable[[StateBatch], torch.Tensor],
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
        if batch.max_query_len <= 1:
            return one_step(batch)
        check_delta(q, k, v, g, beta, state, batch)

        def longer(part: Longer) -> torch.Tensor:
            return self._packed(
                function, part, state, q, k, v, g=part.take(g), beta=part.take(beta), scale=scale,
                use_qk_l2norm_in_kernel=l2norm,
            )  # fmt: skip

        return beside_decodes(batch, longer, one_step)

    def _packed(
        self,
        function: str,
        part: Longer,
        state: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        **others: Any,
    ) -> torch.Tensor:
        """(T', Hv, Dv); the new states are in their pages."""
        y, states = self._functions[function](
            q=part.take(q), k=part.take(k), v=part.take(v), initial_state=part.read(state, torch.float32),
            output_final_state=True, cu_seqlens=part.starts, cu_seqlens_cpu=part.starts_host, **others,
        )  # fmt: skip
        part.write(state, states)
        outputs: torch.Tensor = y.squeeze(0)
        return outputs
