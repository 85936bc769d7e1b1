"""The model's decoder layers, entered by way of the engine: it notes which layer runs, and may compile them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ....errors import UnsupportedModelError
from .context import running

LayerForward = Callable[..., Any]
"""Runs a layer: called with the layer itself, then the model's arguments."""


class DecoderLayers:
    """Holds every layer's ``forward`` from construction to :meth:`release`; outside packed forwards nobody notices.

    :param model: a causal language model of transformers.
    :param run: how a layer of a packed forward is run; None for its own ``forward``.
    :raises UnsupportedModelError: if the model keeps its decoder layers elsewhere.
    """

    def __init__(self, model: Any, num_layers: int, run: LayerForward | None = None) -> None:
        self._layers: Sequence[torch.nn.Module] = _decoder_layers(model, num_layers)
        self._held: list[Any] = [layer.__dict__.get("forward") for layer in self._layers]
        for index, layer in enumerate(self._layers):
            layer.forward = _entered(index, layer, run or _own_forward)

    def release(self) -> None:
        """Give the layers their own ``forward`` back."""
        for layer, held in zip(self._layers, self._held, strict=True):
            if held is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = held


def _entered(index: int, layer: torch.nn.Module, run: LayerForward) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        running().layer = index
        return run(layer, *args, **kwargs)

    return forward


def _own_forward(layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)


def _decoder_layers(model: Any, num_layers: int) -> Sequence[torch.nn.Module]:
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, torch.nn.ModuleList) or len(layers) != num_layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not keep its {num_layers} decoder layers in base_model.layers, where packed"
            " steps enter them; use packed_steps=False",
            option="packed_steps",
            value=type(model).__name__,
            expected=f"base_model.layers of {num_layers} modules",
        )
    return list(layers)
