"""Which functions of a modeling module are exchanged for packed forwards, and that they are what the engine knows."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import Parameter, signature
from types import ModuleType
from typing import Any

import torch

from ....errors import UnsupportedModelError
from ..families import Traits
from ..records import Ready
from .entry_points import ENTRY_POINTS
from .mla import keep_latents

_SWAP = threading.Lock()
"""Held while functions are exchanged, so that two engines cannot restore each other's."""

_HARMLESS = ("use_mambapy", "use_associative_scan")
"""Arguments that choose between ways to the same numbers."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """Functions of one modeling module, and what stands in for each while a packed forward runs."""

    module: ModuleType
    functions: Mapping[str, Callable[..., Any]]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Exchange them; the module is as it was after. Other threads wait with their own packed forwards."""
        if not self.functions:
            yield
            return
        with _SWAP:
            stock = {name: _found(self.module, name) for name in self.functions}
            self._set(self.functions)
            try:
                yield
            finally:
                self._set(stock)

    def _set(self, functions: Mapping[str, Callable[..., Any]]) -> None:
        for name, function in functions.items():
            owner, _, attribute = name.rpartition(".")
            setattr(getattr(self.module, owner) if owner else self.module, attribute, function)


def attends_latents(ready: Ready, traits: Traits) -> bool:
    """Whether every attention layer reads stored latents as they are, so that the model need not expand them."""
    return traits.expand_latents is not None and all(impl.attends_latents for impl in ready.attention.values())


def exchange_for(model: torch.nn.Module, traits: Traits, *, latents: bool = False) -> Exchange:
    """What packed forwards of ``model`` exchange.

    :param latents: whether attention reads stored latents, so that nothing expands them.
    :raises UnsupportedModelError: for a transformers whose functions are not there or take other arguments.
    """
    module = sys.modules[type(model).__module__]
    functions = {name: ENTRY_POINTS[name] for name in traits.kernels}
    if traits.expand_latents is not None and latents:
        functions[traits.expand_latents] = keep_latents
    for name, ours in functions.items():
        _check_arguments(module, name, ours, traits)
    return Exchange(module, functions)


def _check_arguments(module: ModuleType, name: str, ours: Callable[..., Any], traits: Traits) -> None:
    theirs = _found(module, name)
    if not callable(theirs):
        raise _moved(module, traits, f"has no function {name!r}", name)
    known = {*_named(ours), *_HARMLESS, "self"}
    strange = [argument for argument in _named(theirs) if argument not in known]
    if strange:
        raise _moved(module, traits, f"gives {name!r} arguments {', '.join(strange)}", name)


def _found(module: ModuleType, name: str) -> Any:
    """A function of ``module``, or a method as ``Class.method``; None if there is none."""
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _named(function: Callable[..., Any]) -> list[str]:
    parameters = signature(function).parameters.values()
    return [p.name for p in parameters if p.kind not in (Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL)]


def _moved(module: ModuleType, traits: Traits, what: str, name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{module.__name__} {what}, through which packed steps compute the state mixers of {traits.model_type}; this"
        " transformers is not one of those they were made for: use packed_steps=False",
        option="transformers",
        value=module.__name__,
        expected=name,
    )
