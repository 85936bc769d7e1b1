"""What stands in for the kernel functions of transformers' modeling modules while a packed forward runs.

Families call the same few functions, by the names in :data:`ENTRY_POINTS`, as globals of their modeling modules.
The functions here take the same arguments and reach the operators of :mod:`.ops`. They see all requests of a step as
one row of T tokens; where each begins and what state it has, the operators know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from . import zaya

_KERNEL_ACTIVATIONS = {None: None, "silu": "silu", "swish": "silu"}


def causal_conv1d_fn(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """(1, C, T) through a depthwise convolution of weight (C, K)."""
    fused = activation in _KERNEL_ACTIVATIONS
    output: torch.Tensor = torch.ops.makeready.causal_conv(
        _rows(hidden_states[0].transpose(0, 1)), weight, bias, _KERNEL_ACTIVATIONS[activation] if fused else None
    )
    if not fused:
        output = _activation(activation)(output)
    return output.transpose(0, 1)[None]


def mamba2_chunk_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    z: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """(1, T, H, P) through mamba2."""
    output = torch.ops.makeready.mamba2(
        _rows(hidden_states[0]), _rows(dt[0]), A, _rows(B[0]), _rows(C[0]), D, dt_bias, dt_softplus,
        float(dt_limit[0]), float(dt_limit[1]), chunk_size,
    )  # fmt: skip
    if z is not None:
        output = output * torch.nn.functional.silu(z[0])
    return _with_state(output[None], return_final_states)


def mamba_selective_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **kwargs: Any,
) -> Any:
    """(1, I, T) through mamba1."""
    x, steps, keys, queries = (_rows(part[0].transpose(0, 1)) for part in (hidden_states, dt, B, C))
    gate = None if z is None else _rows(z[0].transpose(0, 1))
    output = torch.ops.makeready.mamba1(x, steps, A, keys, queries, D, gate, delta_bias, delta_softplus)
    return _with_state(output.transpose(0, 1)[None], return_last_state)


def chunk_gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    chunk_size: int = 64,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, T, H, D) through the gated delta rule."""
    parts = [_rows(part[0]) for part in (query, key, value, g, beta)]
    output = torch.ops.makeready.gated_delta(*parts, use_qk_l2norm_in_kernel, None)
    return output[None], _no_state(output)


def chunk_kimi_delta_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    chunk_size: int = 64,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, T, H, D) through Kimi delta attention."""
    parts = [_rows(part[0]) for part in (query, key, value, g, beta)]
    output = torch.ops.makeready.kda(*parts, use_qk_l2norm_in_kernel, None)
    return output[None], _no_state(output)


ENTRY_POINTS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "causal_conv1d_fn": causal_conv1d_fn,
        "mamba2_chunk_scan": mamba2_chunk_scan,
        "mamba_selective_scan": mamba_selective_scan,
        "torch_chunk_gated_delta_rule": chunk_gated_delta_rule,
        "chunk_kimi_delta_attention": chunk_kimi_delta_attention,
        "ZayaCCAProjection.forward": zaya.project,
    }
)
"""Name in the modeling module, a function or a method, and what replaces it."""


def _rows(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens whose last axis is contiguous, as kernels read them; a slice of a wider row is not copied."""
    return tokens if tokens.stride(-1) == 1 else tokens.contiguous()


def _with_state(output: torch.Tensor, wanted: bool) -> Any:
    return (output, _no_state(output)) if wanted else output


def _no_state(output: torch.Tensor) -> torch.Tensor:
    """What models hand to the cache as the new state, which the kernel has written already."""
    return output.new_empty(0)


def _activation(name: str | None) -> Callable[[torch.Tensor], torch.Tensor]:
    from transformers.activations import ACT2FN

    function: Callable[[torch.Tensor], torch.Tensor] = ACT2FN[name]
    return function
