"""What plugins hand in and what the host keeps of it: frozen records, no pluggy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..attention_backends.interface import AttentionBackend
from ..hybrid.mixers.backend import MixerBackend
from ..platforms.provider import PluginProblem

if TYPE_CHECKING:
    from ..cache.allocation import KVCache

GROUP = "makeready"
"""The entry-point group that wheels register in."""
DISABLE_VARIABLE = "MAKEREADY_DISABLE_PLUGINS"
"""Environment variable: entry points to leave out, separated by commas, or ``all``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginInfo:
    """A plugin that loaded and whose hooks fit."""

    name: str
    distribution: str
    version: str
    hooks: tuple[str, ...]
    """The hooks that it implements."""
    builtin: bool = False
    claims: tuple[str, ...] = ()
    """Platforms that the wheel's metadata promises."""

    def problem(self, stage: str, exception: str) -> PluginProblem:
        """What is wrong with this plugin."""
        return PluginProblem(
            name=self.name,
            distribution=self.distribution,
            version=self.version,
            stage=stage,
            exception=exception,
            claims=self.claims,
        )

    def to_dict(self) -> dict[str, object]:
        """The plugin as JSON-ready values."""
        return {
            "name": self.name,
            "distribution": self.distribution,
            "version": self.version,
            "hooks": list(self.hooks),
            "builtin": self.builtin,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferedBackend:
    """An attention backend and who brought it."""

    backend: AttentionBackend
    plugin: str
    distribution: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendOffers:
    """The attention backends for one device, in the order their plugins were registered."""

    offered: tuple[OfferedBackend, ...]
    problems: tuple[PluginProblem, ...] = ()
    """Plugins whose hook raised or answered something that is not a backend, for this device."""

    @property
    def backends(self) -> tuple[AttentionBackend, ...]:
        """The backends alone."""
        return tuple(offer.backend for offer in self.offered)


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferedMixer:
    """Kernels of state layers and who brought them."""

    backend: MixerBackend
    plugin: str
    distribution: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MixerOffers:
    """The kernels of state layers for one device, in the order their plugins were registered."""

    offered: tuple[OfferedMixer, ...]
    problems: tuple[PluginProblem, ...] = ()
    """Plugins whose hook raised or answered something that is not a mixer backend, for this device."""

    @property
    def backends(self) -> tuple[MixerBackend, ...]:
        """The kernels alone."""
        return tuple(offer.backend for offer in self.offered)


@dataclass(frozen=True, slots=True, kw_only=True)
class KVConnectorProvider:
    """A way to move KV blocks and states to another engine or store."""

    name: str
    summary: str
    """What it moves the bytes with, in a few words, for ``doctor``."""
    build: Callable[[KVCache, Mapping[str, Any]], object]
    """Makes the connector over a cache, with the user's options; raises a named error if it cannot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartupNote:
    """A sentence that a plugin adds to ``Ready.explain()``."""

    plugin: str
    text: str
