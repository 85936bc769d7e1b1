"""The model's layers tied to their views of the paged cache, once per engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ...attention_backends.interface import AttentionImpl
from ...cache.specs import AttentionSpec, LayerGroup, MambaSpec
from ...errors import BackendError
from .records import Ready


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLayer:
    """One attention layer: where its K and V lie and who reads them."""

    layer: int
    group: int
    spec: AttentionSpec
    key: torch.Tensor
    """(num_blocks, block_size, Hk, D), strided."""
    value: torch.Tensor
    """(num_blocks, block_size, Hk, Dv), strided."""
    impl: AttentionImpl


@dataclass(frozen=True, slots=True, kw_only=True)
class StateLayer:
    """One state layer: its tensors in the cache, (num_blocks, *shape) each."""

    layer: int
    group: int
    conv: tuple[torch.Tensor, ...]
    recurrent: tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """All layers of a model. A layer with attention and a state is in both maps."""

    num_layers: int
    groups: tuple[LayerGroup, ...]
    block_size: int
    attention: Mapping[int, AttentionLayer]
    states: Mapping[int, StateLayer]


def bind(ready: Ready, num_layers: int) -> Binding:
    """Tie layers to views.

    :param num_layers: layers of the model, those that store nothing included.
    :raises BackendError: for an attention layer without a built backend.
    """
    attention: dict[int, AttentionLayer] = {}
    states: dict[int, StateLayer] = {}
    for group in ready.groups:
        for layer in group.layers:
            if isinstance(layer.spec, MambaSpec):
                states[layer.layer] = _bind_state(ready, group.index, layer.layer, layer.spec)
            else:
                attention[layer.layer] = _bind_attention(ready, group.index, layer.layer, layer.spec)
    return Binding(
        num_layers=num_layers,
        groups=ready.groups,
        block_size=ready.block_size,
        attention=attention,
        states=states,
    )


def _bind_attention(ready: Ready, group: int, layer: int, spec: AttentionSpec) -> AttentionLayer:
    if layer not in ready.attention:
        raise BackendError(
            f"attention layer {layer} has no built backend; built are those of layers {sorted(ready.attention)}",
            option="attention",
            value=layer,
            expected="a backend per attention layer",
        )
    key, value = ready.cache.key_value(layer)
    return AttentionLayer(layer=layer, group=group, spec=spec, key=key, value=value, impl=ready.attention[layer])


def _bind_state(ready: Ready, group: int, layer: int, spec: MambaSpec) -> StateLayer:
    """A state's tensors by name: ``conv...`` are convolution states, in their order; the others are recurrent."""
    named = tuple(zip((state.name for state in spec.states), ready.cache.states(layer), strict=True))
    return StateLayer(
        layer=layer,
        group=group,
        conv=tuple(tensor for name, tensor in named if name.startswith("conv")),
        recurrent=tuple(tensor for name, tensor in named if not name.startswith("conv")),
    )
