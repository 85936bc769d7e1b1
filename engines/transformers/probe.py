"""Two tokens through the stock cache at load, to see that the plan describes this model."""

from __future__ import annotations

from typing import Any

import torch

from ...cache.specs import AttentionSpec, LayerGroup, MambaSpec
from ...errors import UnsupportedModelError
from .families import Traits

Facts = dict[tuple[int, str], tuple[tuple[int, ...], str]]
"""(layer, what) -> (shape for one request or token, dtype)."""


def check_plan(model: Any, traits: Traits, groups: tuple[LayerGroup, ...], *, any_state_dtype: bool = False) -> None:
    """Compare what ``model`` stores with what ``groups`` plan for it.

    :param any_state_dtype: whether states may be stored in another dtype than the model's own code gives them.
    :raises UnsupportedModelError: naming the layer and both shapes.
    """
    found, planned = stored_by(model, traits), planned_for(groups, traits)
    if any_state_dtype:
        found, planned = ({key: (shape, "any") for key, (shape, _) in facts.items()} for facts in (found, planned))
    for layer, what in sorted(found.keys() | planned.keys()):
        is_, should = found.get((layer, what)), planned.get((layer, what))
        if is_ != should:
            raise UnsupportedModelError(
                f"layer {layer} of {traits.model_type} stores {_words(what, is_)}, and the plan has"
                f" {_words(what, should)}",
                option="model",
                value=_words(what, is_),
                expected=_words(what, should),
            )


def stored_by(model: Any, traits: Traits) -> Facts:
    """What a stock ``DynamicCache`` holds after two tokens, per layer."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    tokens = torch.tensor([[1, 1]], device=model.device)
    inputs: dict[str, Any] = {"input_ids": tokens, traits.cache_argument: cache, "use_cache": True}
    if traits.takes_positions:
        inputs["position_ids"] = torch.arange(2, device=model.device)[None]
    with torch.no_grad():
        model(**inputs)
    facts: Facts = {}
    for index, layer in enumerate(cache.layers):
        _add_attention(facts, index, layer)
        _add_states(facts, index, layer)
    return facts


def planned_for(groups: tuple[LayerGroup, ...], traits: Traits) -> Facts:
    """The same, as the plan has it. The engine keeps K and V in the model's dtype or as the plan stores them."""
    facts: Facts = {}
    for group in groups:
        for layer in group.layers:
            spec = layer.spec
            if isinstance(spec, AttentionSpec):
                facts[layer.layer, "K"] = ((spec.num_kv_heads, spec.head_size), "any")
                facts[layer.layer, "V"] = ((spec.num_kv_heads, spec.head_size_v), "any")
            else:
                _add_planned_states(facts, layer.layer, spec)
    return facts


def _add_planned_states(facts: Facts, layer: int, spec: MambaSpec) -> None:
    counts = {"conv": 0, "recurrent": 0}
    for state in spec.states:
        kind = "conv" if state.name.startswith("conv") else "recurrent"
        facts[layer, f"{kind} state {counts[kind]}"] = (state.shape, state.dtype)
        counts[kind] += 1


def _add_attention(facts: Facts, index: int, layer: Any) -> None:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if keys is not None and values is not None and keys.numel():
        facts[index, "K"] = ((keys.shape[1], keys.shape[3]), "any")
        facts[index, "V"] = ((values.shape[1], values.shape[3]), "any")


def _add_states(facts: Facts, index: int, layer: Any) -> None:
    for kind in ("conv", "recurrent"):
        for state_idx, state in _numbered(getattr(layer, f"{kind}_states", None)):
            if state is not None:
                dtype = str(state.dtype).removeprefix("torch.")
                facts[index, f"{kind} state {state_idx}"] = (tuple(state.shape[1:]), dtype)


def _numbered(states: Any) -> list[tuple[int, Any]]:
    if states is None:
        return []
    return list(states.items()) if isinstance(states, dict) else list(enumerate(states))


def _words(what: str, fact: tuple[tuple[int, ...], str] | None) -> str:
    if fact is None:
        return f"no {what}"
    shape, dtype = fact
    return f"{what} {shape}" if dtype == "any" else f"{what} {shape} of {dtype}"
