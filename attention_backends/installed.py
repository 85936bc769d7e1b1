"""What is installed, asked for in the order in which it can fail: distribution, import, the functions we call."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib import import_module, metadata
from importlib.util import find_spec
from inspect import signature
from typing import Any


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, without importing it; ``None`` where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, ...]:
    """``(2, 13)`` of ``2.13.0+cpu``; empty, which is less than any, for what is no version."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return tuple(map(int, found.groups())) if found else ()


def found_module(module: str) -> bool:
    """Whether the top of ``module`` could be imported; nothing is loaded."""
    try:
        return find_spec(module.partition(".")[0]) is not None
    except (ImportError, ValueError):
        return False


def load_attribute(module: str, name: str) -> Any:
    """``module.name``; imports the module.

    :raises AttributeError: if the module lacks it.
    """
    return getattr(import_module(module), name)


def lacking_parameters(function: Callable[..., Any], wanted: Sequence[str]) -> list[str]:
    """Which of the parameters that we pass ``function`` does not take: other releases have other signatures."""
    taken = signature(function).parameters
    return [name for name in wanted if name not in taken]
