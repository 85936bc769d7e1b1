"""Published models whose numbers come with the package, so that ``plan`` works without a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import ModelConfigError

FILE = Path(__file__).with_name("presets.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """One published model."""

    id: str
    config: Mapping[str, Any]
    """Fields as in the model's config.json, as far as planning needs them."""
    source: str
    """Where the numbers were seen."""
    confidence: str
    """``verified-file``, ``verified-code``, ``class-default`` or ``remembered``."""
    unverified_fields: tuple[str, ...]
    assembled: str
    """What was filled in that the source did not say; empty if nothing was."""


def preset_names() -> tuple[str, ...]:
    """Ids of all presets, in alphabetical order."""
    return tuple(sorted(_presets(), key=str.lower))


def is_preset(name: str) -> bool:
    """True if there is a preset of this id, in any case of letters, with or without the organisation."""
    return _find(name) is not None


def preset(name: str) -> Preset:
    """The preset of this id, in any case of letters, with or without the organisation.

    :raises ModelConfigError: naming the presets that come close.
    """
    found = _find(name)
    if found is not None:
        return found
    presets = _presets()
    short = {known.rpartition("/")[2].lower(): known for known in presets}
    close = get_close_matches(name.rpartition("/")[2].lower(), short, n=3, cutoff=0.5)
    hint = f", did you mean {' or '.join(short[match] for match in close)}" if close else ""
    raise ModelConfigError(
        f"{name!r} is no directory, no config.json and no preset{hint}; `makeready plan --list` prints the "
        f"{len(presets)} presets",
        option="model",
        value=name,
        expected=[short[match] for match in close] or "a name that makeready plan --list prints, or a path",
    )


def _find(name: str) -> Preset | None:
    presets = _presets()
    if name in presets:
        return presets[name]
    wanted = name.lower()
    for known, found in presets.items():
        if wanted in (known.lower(), known.rpartition("/")[2].lower()):
            return found
    return None


@cache
def _presets() -> Mapping[str, Preset]:
    entries = json.loads(FILE.read_text(encoding="utf-8"))["models"]
    return MappingProxyType({
        entry["id"]: Preset(
            id=entry["id"],
            config=MappingProxyType(entry["config"]),
            source=entry["source"],
            confidence=entry["confidence"],
            unverified_fields=tuple(entry["unverified_fields"]),
            assembled=entry["assembled"],
        )
        for entry in entries
    })  # fmt: skip
