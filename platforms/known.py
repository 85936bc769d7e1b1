"""Platforms that the package can plan for on any machine. Running on one takes its wheel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from .cpu import CPU
from .cuda import CUDA
from .interface import Platform
from .provider import PlatformProvider
from .xpu import XPU


def known_platforms() -> Mapping[str, Platform]:
    """Platforms by name, those of the package itself: ``cpu``, ``cuda`` and ``xpu``."""
    return MappingProxyType({platform.name: platform for platform in (CPU, CUDA, XPU)})


def plannable_platforms(providers: Iterable[PlatformProvider]) -> Mapping[str, Platform]:
    """Known platforms and those that plugins bring; a plugin's policy for a known name goes first."""
    return MappingProxyType({**known_platforms(), **{given.name: given.platform for given in providers}})
