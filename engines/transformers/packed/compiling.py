"""Decoder layers compiled once per kind of layer: identical layers share their code, whatever their index."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

CompiledForward = Callable[..., Any]

KINDS = 64
"""Kinds of layers, times two (one token, several): more than any model has."""


class CompiledLayers:
    """Runs decoder layers through ``torch.compile``.

    Layers differ in their weights, which are inputs of what is compiled, and in their index, which it never reads.
    The number of tokens is dynamic, with code of its own for one token.

    :param backend: of ``torch.compile``.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self._backend = backend
        self._compiled: dict[type, CompiledForward] = {}

    def __call__(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run ``layer`` as the model would."""
        for value in (*args, *kwargs.values()):
            _mark(value)
        return self._forward_of(type(layer))(layer, *args, **kwargs)

    @contextmanager
    def limits(self) -> Iterator[None]:
        """Room for every kind of layer, while a forward runs."""
        with torch._dynamo.config.patch(recompile_limit=KINDS, allow_unspec_int_on_nn_module=True):
            yield

    def _forward_of(self, kind: type) -> CompiledForward:
        if kind not in self._compiled:
            forward: Any = kind.forward  # type: ignore[attr-defined]
            self._compiled[kind] = torch.compile(forward, backend=self._backend, fullgraph=True)
        return self._compiled[kind]


def _mark(value: Any) -> None:
    """Let the tokens' axis, the second of (1, T, ...), be dynamic; one token is a case of its own."""
    if isinstance(value, torch.Tensor):
        if value.dim() > 1 and value.shape[0] == 1 and value.shape[1] > 1:
            torch._dynamo.maybe_mark_dynamic(value, 1)
    elif isinstance(value, (tuple, list)):
        for part in value:
            _mark(part)
