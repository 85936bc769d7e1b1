"""Facts about a device as plain data, so that every policy can be tested without the device."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from .errors import ConfigError

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}

LEAST_BARE_BYTES = 2**20
"""A number without a unit below this is a slip: no cache and no device is that small."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """What is known of one device. A planned device that is not here has ``present=False``."""

    platform: str
    """Name of the platform that the device belongs to: ``cpu``, ``cuda``, ``xpu`` or a vendor's own."""
    device_type: str
    """What ``torch.device`` calls it."""
    name: str = "unknown"
    """The vendor's name of the device."""
    index: int = 0
    """Ordinal among the devices of this type."""
    memory_bytes: int | None = None
    """Total memory, in bytes; ``None`` where nobody said."""
    compute_capability: tuple[int, int] | None = None
    """CUDA compute capability (major, minor)."""
    compute_units: int | None = None
    """Multiprocessors (CUDA), subslices (XPU) or cores (CPU)."""
    isa: str | None = None
    """Instruction set of a CPU that kernels choose by, such as ``AVX512_BF16`` or ``AMX``."""
    versions: tuple[tuple[str, str], ...] = ()
    """Software found by the probe, as (name, version)."""
    present: bool = True
    """False for a device that is only planned for."""


def parse_bytes(text: str | int, *, option: str = "memory") -> int:
    """Bytes from ``"80GiB"``, ``"512 MB"``, ``"40e9"`` or a plain number.

    :raises ConfigError: for anything else, for a size that is not positive, or for a number without a unit that is so
        small that another unit was meant.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        value = text
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:[eE]\d+)?)\s*([A-Za-z]*)\s*", str(text))
        if match is None or math.isinf(size := _size(*match.groups())):
            raise ConfigError(
                f"{option} {text!r} is not a size; write a number with a unit, such as 80GiB or 512MB",
                option=option,
                value=text,
                expected="a number with B, KiB, MiB, GiB, TiB, KB, MB, GB or TB",
            )
        number, unit = match.groups()
        value = int(size)
        if not unit and 0 < value < LEAST_BARE_BYTES:
            meant = f"{number}GiB" if value < 4096 else f"{number}KiB"
            raise ConfigError(
                f"{option} {text!r} has no unit and would be {value} bytes, did you mean {meant}; bytes are {number}B",
                option=option,
                value=text,
                expected=f"a number with a unit, such as {meant}, or bytes from {LEAST_BARE_BYTES}",
            )
    if value <= 0:
        raise ConfigError(f"{option} {text!r} must be larger than zero", option=option, value=text, expected="> 0")
    return value


def _size(number: str, unit: str) -> float:
    """Bytes; without end for what no size is."""
    return float(number) * _UNITS.get(unit.upper(), math.inf)


def format_bytes(count: int) -> str:
    """``count`` bytes for people: ``"4.08 MiB"``; exact below 1 KiB."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{count} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1024
    return f"{value:.2f} TiB"
