"""Where plugins come from: the package itself, installed wheels' entry points, the calling process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from importlib.metadata import EntryPoint

from ..platforms.provider import PluginProblem, describe_exception, normalized
from .records import DISABLE_VARIABLE, GROUP, PluginInfo

_PREFIX = "makeready-"
_KEYWORD = "makeready-platform-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Whose plugin it is; known before the plugin is loaded, so that a broken one can be named."""

    name: str
    distribution: str
    version: str
    builtin: bool = False
    claims: tuple[str, ...] = ()
    """Platforms that the wheel's metadata promises."""

    @classmethod
    def own(cls, name: str) -> Source:
        """A plugin that comes with the package."""
        return cls(name=name, distribution="makeready", version=_own_version(), builtin=True)

    @classmethod
    def of_process(cls, name: str) -> Source:
        """A plugin that the calling process handed in."""
        return cls(name=name, distribution="this process", version="")

    @classmethod
    def of_wheel(cls, entry_point: EntryPoint) -> Source:
        """A plugin of an installed wheel, as far as its metadata can be read."""
        try:
            dist = entry_point.dist
            if dist is None:
                return cls(name=entry_point.name, distribution="unknown", version="unknown")
            distribution, keywords = dist.metadata["Name"], dist.metadata["Keywords"]
            return cls(
                name=entry_point.name,
                distribution=distribution,
                version=dist.version,
                claims=_claims(distribution, keywords or ""),
            )
        except Exception:  # damaged metadata must not sink the other plugins; the plugin itself may still load
            return cls(name=entry_point.name, distribution="unknown", version="unknown")

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

    def info(self, hooks: tuple[str, ...]) -> PluginInfo:
        """The plugin once it was let in."""
        return PluginInfo(
            name=self.name,
            distribution=self.distribution,
            version=self.version,
            hooks=hooks,
            builtin=self.builtin,
            claims=self.claims,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A plugin that was found and is not loaded yet."""

    source: Source
    load: Callable[[], object]


def found_entry_points(entry_points: Iterable[EntryPoint] | None) -> tuple[Found, ...]:
    """The plugins of installed wheels by name, or of the entry points given; none is loaded yet."""
    group = metadata.entry_points(group=GROUP) if entry_points is None else entry_points
    ordered = sorted(group, key=lambda entry_point: (entry_point.name, entry_point.value))
    return tuple(Found(source=Source.of_wheel(entry_point), load=entry_point.load) for entry_point in ordered)


def loaded(found: Found) -> object | PluginProblem:
    """The plugin, or what its import raised. A wheel may raise anything at import, ``SystemExit`` included."""
    try:
        return found.load()
    except (Exception, SystemExit) as error:
        return found.source.problem("import", describe_exception(error))


def disabled_names(setting: str | None) -> frozenset[str]:
    """Entry points to leave out: ``setting``, or the environment variable's value if it is ``None``."""
    text = os.environ.get(DISABLE_VARIABLE, "") if setting is None else setting
    return frozenset(name.strip() for name in text.split(",") if name.strip())


def _claims(distribution: str, keywords: str) -> tuple[str, ...]:
    words = [normalized(word) for word in keywords.replace(",", " ").split()]
    claims = [word.removeprefix(_KEYWORD) for word in words if word.startswith(_KEYWORD)]
    if normalized(distribution).startswith(_PREFIX):
        claims.append(normalized(distribution).removeprefix(_PREFIX))
    return tuple(dict.fromkeys(claims))


def _own_version() -> str:
    try:
        return metadata.version("makeready")
    except metadata.PackageNotFoundError:
        return "not installed"
