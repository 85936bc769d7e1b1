"""Checks a plugin before it is let in, and what its hooks answer before it is used."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import pluggy

from ..attention_backends.interface import AttentionBackend
from ..cache.block_size import CONSTRAINT_TYPES, Constraint
from ..hybrid.mixers.backend import MixerBackend
from ..platforms.interface import Platform
from ..platforms.provider import PlatformProvider, describe_exception
from . import hookspecs
from .records import KVConnectorProvider

HOOK_NAMES: tuple[str, ...] = tuple(name for name in vars(hookspecs) if name.startswith(f"{hookspecs.PROJECT}_"))


class Refused(Exception):
    """A plugin, or what its hook answered, cannot be used; the text says why."""


def new_manager() -> pluggy.PluginManager:
    """A plugin manager that knows the hooks and no plugin."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    return manager


def check_plugin(plugin: object, name: str) -> tuple[str, ...]:
    """The hooks that ``plugin`` implements, once all of them fit.

    :raises Refused: unknown hook, arguments that the hook does not have, a hook wrapper, a function named like a
        hook but not marked, a class instead of an instance, or no hook at all.
    """
    if inspect.isclass(plugin):
        raise Refused(f"the entry point names the class {plugin.__name__}; name a module or an instance")
    scratch = new_manager()  # a plugin that fails half-way stays in the manager that took it
    try:
        hash(plugin)  # pluggy keeps plugins in sets
        scratch.register(plugin, name)
        scratch.check_pending()
    except pluggy.PluginValidationError as error:
        raise Refused(_one_line(str(error))) from error
    except Exception as error:  # pluggy reads every attribute of the plugin, which may raise anything
        raise Refused(describe_exception(error)) from error
    callers = scratch.get_hookcallers(plugin) or []
    hooks = tuple(caller.name for caller in callers)
    for caller in callers:
        if any(impl.wrapper or impl.hookwrapper for impl in caller.get_hookimpls()):
            raise Refused(f"{caller.name} is a hook wrapper; hooks here return values and wrap nothing")
    unmarked = [hook for hook in HOOK_NAMES if hook not in hooks and callable(getattr(plugin, hook, None))]
    if unmarked:
        raise Refused(f"{', '.join(unmarked)} is not marked with @makeready.plugins.hookspecs.hookimpl")
    if not hooks:
        raise Refused(f"it implements none of the hooks {', '.join(HOOK_NAMES)}")
    return hooks


def checked_platforms(answer: object) -> tuple[PlatformProvider, ...]:
    """What ``makeready_platforms`` answered, checked."""
    providers = _sequence_of(answer, PlatformProvider, "makeready_platforms")
    for provider in providers:
        if not isinstance(provider.platform, Platform):
            raise Refused(
                f"makeready_platforms: the platform of provider {provider.name!r} is "
                f"{type(provider.platform).__name__}, expected an instance of makeready.platforms.interface.Platform"
            )
        if provider.platform.name != provider.name:
            raise Refused(
                f"makeready_platforms: provider {provider.name!r} holds the platform {provider.platform.name!r}; "
                f"the two names must be equal"
            )
        if type(provider.platform).update_block_size_for_backend is not Platform.update_block_size_for_backend:
            raise Refused(
                f"makeready_platforms: {type(provider.platform).__name__} overrides update_block_size_for_backend; "
                f"declare constraints instead: the two phases are the same on every platform"
            )
        if not callable(provider.probe):
            raise Refused(f"makeready_platforms: the probe of provider {provider.name!r} cannot be called")
    _no_repeats([provider.name for provider in providers], "makeready_platforms")
    return providers


def checked_backends(answer: object) -> tuple[AttentionBackend, ...]:
    """What ``makeready_attention_backends`` answered, checked."""
    backends = _sequence_of(answer, AttentionBackend, "makeready_attention_backends")
    _require_names(backends, "makeready_attention_backends")
    return backends


def checked_mixers(answer: object) -> tuple[MixerBackend, ...]:
    """What ``makeready_mixer_backends`` answered, checked."""
    backends = _sequence_of(answer, MixerBackend, "makeready_mixer_backends")
    _require_names(backends, "makeready_mixer_backends")
    return backends


def _require_names(backends: Sequence[AttentionBackend | MixerBackend], hook: str) -> None:
    for backend in backends:
        if not isinstance(getattr(backend, "name", None), str):
            raise Refused(f"{hook}: {type(backend).__name__} has no name")
    _no_repeats([backend.name for backend in backends], hook)


def checked_connectors(answer: object) -> tuple[KVConnectorProvider, ...]:
    """What ``makeready_kv_connectors`` answered, checked."""
    connectors = _sequence_of(answer, KVConnectorProvider, "makeready_kv_connectors")
    _no_repeats([connector.name for connector in connectors], "makeready_kv_connectors")
    return connectors


def checked_constraints(answer: object) -> tuple[Constraint, ...]:
    """What ``makeready_block_size_constraints`` answered, checked."""
    return _sequence_of(answer, CONSTRAINT_TYPES, "makeready_block_size_constraints")


def checked_note(answer: object) -> str:
    """What ``makeready_engine_startup`` answered, checked."""
    if not isinstance(answer, str):
        raise Refused(f"makeready_engine_startup returned {type(answer).__name__}, expected a sentence or None")
    return answer


def _sequence_of(answer: object, kinds: type[Any] | tuple[type[Any], ...], hook: str) -> tuple[Any, ...]:
    expected = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
    if isinstance(answer, (str, bytes)) or not isinstance(answer, Sequence):
        raise Refused(f"{hook} returned {type(answer).__name__}, expected a sequence of {expected}")
    for item in answer:
        if not isinstance(item, kinds):
            raise Refused(f"{hook} returned a sequence with {type(item).__name__}, expected {expected}")
    return tuple(answer)


def _no_repeats(names: Sequence[str], hook: str) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise Refused(f"{hook} names {', '.join(repeated)} more than once")


def _one_line(text: str) -> str:
    """pluggy's message as one line; it breaks it over several."""
    return " ".join(text.split())
