"""What a plugin hands in for a platform, what a probe answers, and what is wrong with a plugin: plain records."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..device import DeviceFacts

if TYPE_CHECKING:
    from .interface import Platform

STAGES: tuple[str, ...] = ("import", "register", "call", "result", "probe")
"""Where a plugin can break: loading it, checking its hooks, calling one, checking its answer, its probe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """Whether a platform's devices are here and usable: a value, never an exception."""

    available: bool
    reason: str
    """A sentence: what was found, or what is missing and how to get it."""
    devices: tuple[DeviceFacts, ...] = ()
    """The devices that can be used, by index; not empty if ``available``."""
    versions: tuple[tuple[str, str], ...] = ()
    """Software that was found, as (name, version), also when no device was."""

    def to_dict(self) -> dict[str, object]:
        """The result as JSON-ready values."""
        return {
            "available": self.available,
            "reason": self.reason,
            "devices": [device_to_dict(device) for device in self.devices],
            "versions": dict(self.versions),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformProvider:
    """A platform that can run here: its policy, its probe, and the wheel that brought it."""

    name: str
    """What the user writes after ``--platform``; equals ``platform.name``."""
    platform: Platform
    """The policy object; it decides from facts alone and never touches the device."""
    probe: Callable[[], ProbeResult]
    """Looks for the devices. Never raises; may import torch."""
    distribution: str
    """The wheel that provides it, such as ``makeready-cuda``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginProblem:
    """A plugin that was found but cannot be used."""

    name: str
    """The entry point's name."""
    distribution: str
    """The wheel that it came from; ``unknown`` where its metadata does not say."""
    version: str
    stage: str
    """One of :data:`STAGES`."""
    exception: str
    """The exception's type and text, or the sentence that says what was wrong."""
    claims: tuple[str, ...] = ()
    """Platforms that the plugin says it brings, in its wheel's metadata or by its distribution's name."""

    def sentence(self) -> str:
        """The problem in one sentence that names the plugin, the wheel and the exception."""
        doing = {
            "import": "cannot be imported",
            "register": "has hooks that do not fit",
            "call": "raised in a hook",
            "result": "returned something that cannot be used",
            "probe": "raised while it looked for its devices",
        }[self.stage]
        return f"plugin {self.name!r} ({self.distribution} {self.version}) {doing}: {self.exception}"

    def may_provide(self, platform: str) -> bool:
        """Whether the plugin would have brought ``platform``.

        A plugin that does not load cannot say so itself. By convention its entry point is named like the
        platform; its wheel may also be called ``makeready-PLATFORM`` or carry the keyword
        ``makeready-platform-PLATFORM``.
        """
        return normalized(platform) in {normalized(name) for name in (self.name, *self.claims)}

    def to_dict(self) -> dict[str, object]:
        """The problem as JSON-ready values."""
        return {
            "name": self.name,
            "distribution": self.distribution,
            "version": self.version,
            "stage": self.stage,
            "exception": self.exception,
            "sentence": self.sentence(),
        }


def normalized(name: str) -> str:
    """A name as package metadata compares it: lower case, runs of ``-``, ``_`` and ``.`` as one dash."""
    return re.sub(r"[-_.]+", "-", name).lower()


def device_to_dict(device: DeviceFacts) -> dict[str, object]:
    """Facts of a device as JSON-ready values."""
    return {
        "platform": device.platform,
        "device_type": device.device_type,
        "index": device.index,
        "name": device.name,
        "memory_bytes": device.memory_bytes,
        "compute_capability": list(device.compute_capability) if device.compute_capability else None,
        "compute_units": device.compute_units,
        "isa": device.isa,
        "versions": dict(device.versions),
        "present": device.present,
    }


def describe_exception(error: BaseException) -> str:
    """``ModuleNotFoundError: No module named 'x'``: type and text in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
