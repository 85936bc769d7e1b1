"""Zaya's projection to Q, K and V in packed forwards, which convolves Q and K twice and delays half of V by a token.

transformers has no function for what crosses tokens there: the projection's ``forward`` itself is exchanged.
"""

from __future__ import annotations

from typing import Any

import torch


def project(
    module: Any, hidden_states: torch.Tensor, past_key_values: Any, conv_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stands in for ``ZayaCCAProjection.forward``: (1, T, hidden) to Q, K and V, (1, T, heads, D) each."""
    queries, keys = module.q_proj(hidden_states), module.k_proj(hidden_states)
    tokens, size, group = hidden_states.shape[1], module.head_dim, module.num_key_value_groups
    per_key = queries.view(tokens, -1, group, size) + keys.view(tokens, -1, 1, size)
    query_part = per_key.flatten(1, 2) * 0.5
    key_part = query_part.view(tokens, -1, group, size).mean(dim=2)
    mixed = _convolved(module, torch.cat([queries, keys], dim=-1)[0])
    heads = query_part.shape[1]
    value = torch.cat([module.v_proj_current(hidden_states)[0], _delayed(module, hidden_states)], dim=-1)
    return (
        (mixed[:, :heads] + query_part)[None],
        (mixed[:, heads:] + key_part)[None],
        value.view(1, tokens, -1, size),
    )


def _convolved(module: Any, mixed: torch.Tensor) -> torch.Tensor:
    """(T, C) through the depthwise and then the grouped convolution: (T, heads, D).

    The second reads what the first makes of the tokens before; that is computed again from their inputs.
    """
    first, second = module.conv_qk_depthwise, module.conv_qk_grouped
    width, size, groups = second.kernel_size[0], module.head_dim, second.groups
    seen = torch.ops.makeready.stacked_conv(mixed, first.weight[:, 0], first.bias, width)
    inputs = seen.view(width, -1, groups, size).permute(2, 1, 0, 3).flatten(2)
    weight = second.weight.view(groups, size, size, width).permute(0, 3, 2, 1).flatten(1, 2)
    output = torch.bmm(inputs, weight).transpose(0, 1)
    return output if second.bias is None else output + second.bias.view(groups, size)


def _delayed(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Each token's predecessor through ``v_proj_delayed``, (T, C); before a request's first token there are zeros."""
    bias = module.v_proj_delayed.bias
    projected = torch.nn.functional.linear(hidden_states[0], module.v_proj_delayed.weight)
    before: torch.Tensor = torch.ops.makeready.delayed(projected)
    return before if bias is None else before + bias
