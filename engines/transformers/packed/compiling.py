"""Decoder layers compiled once per kind of layer: identical layers share their code, whatever their index."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType
from typing import Any

import torch

from .merging import merge_linears
from .overlapping import overlap_attention

CompiledForward = Callable[..., Any]

BESIDE = {
    "reorder_for_peak_memory": False,
    "reorder_for_locality": False,
    "allow_buffer_reuse": False,
    "inplace_buffers": False,
}
"""Of Inductor, where attention runs aside: the order is a purpose, and memory that attention reads has later readers
that Inductor does not know of; it is free when the last reference to it goes (:class:`.context.Begun`)."""

KINDS = 64
"""Kinds of layers, times two (one token, several): more than any model has."""


class CompiledLayers:
    """Runs decoder layers through ``torch.compile``.

    Layers differ in their weights, which are inputs of what is compiled, and in their index, which it never reads.
    The number of tokens is dynamic, with code of its own for one token.

    :param backend: of ``torch.compile``.
    :param options: of the backend, for any number of tokens.
    :param one_token: of the backend, for one token, where everything is a matter of reading weights.
    """

    def __init__(
        self,
        backend: str = "inductor",
        options: dict[str, Any] | None = None,
        one_token: dict[str, Any] | None = None,
    ) -> None:
        self._backend, self._options, self._one_token = backend, options, one_token
        self._compiled: dict[tuple[type, bool], CompiledForward] = {}

    def __call__(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run ``layer`` as the model would."""
        hidden_states = args[0] if args else kwargs["hidden_states"]
        for value in (*args, *kwargs.values()):
            _mark(value)
        return self._forward_of(type(layer), hidden_states.shape[1] == 1)(layer, *args, **kwargs)

    @contextmanager
    def limits(self) -> Iterator[None]:
        """Room for every kind of layer, while a forward runs."""
        with torch._dynamo.config.patch(recompile_limit=KINDS, allow_unspec_int_on_nn_module=True):
            yield

    def _forward_of(self, kind: type, one_token: bool) -> CompiledForward:
        if (kind, one_token) not in self._compiled:
            forward: Any = kind.forward  # type: ignore[attr-defined]
            backend = partial(self._compile, one_token)
            # A function of its own for each, since compiled code is kept by function.
            self._compiled[kind, one_token] = torch.compile(_copied(forward), backend=backend, fullgraph=True)
        return self._compiled[kind, one_token]

    def _compile(self, one_token: bool, module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        from torch._dynamo import lookup_backend

        options = dict((self._one_token if one_token else self._options) or {})
        if overlap_attention(module) and self._backend == "inductor":
            options |= BESIDE
        merge_linears(module, alone=one_token)
        backend: Any = lookup_backend(self._backend)
        return backend(module, inputs, config_patches=options) if options else backend(module, inputs)


def _copied(function: FunctionType) -> FunctionType:
    copied = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _mark(value: Any) -> None:
    """Let the tokens' axis, the second of (1, T, ...), be dynamic; one token is a case of its own."""
    if isinstance(value, torch.Tensor):
        if value.dim() > 1 and value.shape[0] == 1 and value.shape[1] > 1:
            torch._dynamo.maybe_mark_dynamic(value, 1)
    elif isinstance(value, (tuple, list)):
        for part in value:
            _mark(part)
