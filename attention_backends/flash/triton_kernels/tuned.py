"""Configurations that ``makeready bench tune`` measured, by device; what it did not measure comes from ``configs``.

No torch, no Triton. The file ``tuned.json`` beside this one holds the entries, each with its measurement.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ....device import DeviceFacts
from ....errors import ConfigError
from .configs import LONG_QUERIES, DecodeConfig, PrefillConfig, decode_config, prefill_config

TABLE = Path(__file__).with_name("tuned.json")
LEAST_ROWS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line of the table."""

    kind: str
    """``decode`` or ``prefill``."""
    device: str
    """The device's name, as its vendor writes it: entries serve this device alone."""
    head_size: int
    """As padded to a power of two."""
    rows: int
    """Decode: query heads of a KV head, as padded to the fewest rows of a tile. Prefill: query heads of a KV head."""
    config: DecodeConfig | PrefillConfig
    figures: Mapping[str, str]
    """Per case what was measured with this configuration, such as ``265 us, 4.05 TB/s``."""
    measured: str
    """Date and software."""

    @property
    def key(self) -> tuple[str, str, int, int]:
        """What makes two entries answer the same question."""
        return (self.kind, self.device, self.head_size, self.rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


class Configs:
    """The table: what was measured on the device for this shape, else the built-in configuration.

    :param entries: of any devices.
    """

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._entries = {entry.key: entry for entry in entries}

    def decode(
        self, device: DeviceFacts, *, head_size: int, rows: int, narrow: bool, invariant: bool, max_model_len: int
    ) -> DecodeConfig:
        """As :func:`configs.decode_config`. Narrow K and V and the batch-invariant mode are never taken from here."""
        if not narrow and not invariant:
            entry = self._entries.get(("decode", device.name, head_size, max(LEAST_ROWS, rows)))
            if entry is not None and isinstance(entry.config, DecodeConfig):
                return entry.config
        return decode_config(
            device, head_size=head_size, rows=rows, narrow=narrow, invariant=invariant, max_model_len=max_model_len
        )

    def prefill(
        self, device: DeviceFacts, head_size: int, head_size_v: int, group: int, *, requests: int, queries: int,
        keys: int, block_size: int, causal: bool, narrow: bool, invariant: bool, max_model_len: int,
    ) -> PrefillConfig:  # fmt: skip
        """As :func:`configs.prefill_config`, with the entry only where its way to read K and V holds for the step."""
        if head_size == head_size_v and causal and not narrow and not invariant:
            entry = self._entries.get(("prefill", device.name, padded(head_size), group))
            if (
                entry is not None
                and isinstance(entry.config, PrefillConfig)
                and serves(entry.config, group, queries // max(requests, 1))
            ):
                return entry.config
        return prefill_config(
            device, head_size, head_size_v, group, requests=requests, queries=queries, keys=keys,
            block_size=block_size, causal=causal, narrow=narrow, invariant=invariant, max_model_len=max_model_len,
        )  # fmt: skip


class Forced(Configs):
    """One configuration for everything of its kind, as tuning and tests want it."""

    def __init__(self, config: DecodeConfig | PrefillConfig) -> None:
        super().__init__()
        self._config = config

    def decode(self, device: DeviceFacts, **facts: Any) -> DecodeConfig:
        """The forced configuration, if it is one of decode."""
        return self._config if isinstance(self._config, DecodeConfig) else super().decode(device, **facts)

    def prefill(self, device: DeviceFacts, *shape: int, **facts: Any) -> PrefillConfig:
        """The forced configuration, if it is one of prefill."""
        return self._config if isinstance(self._config, PrefillConfig) else super().prefill(device, *shape, **facts)


def serves(config: PrefillConfig, group: int, queries: int) -> bool:
    """Whether ``config`` can and should serve requests of ``queries`` tokens: a copy that pays, a group in a tile."""
    return config.block_m >= group and (config.source == "pages" or queries >= LONG_QUERIES)


def padded(head_size: int) -> int:
    """The next power of two, 16 or more."""
    return max(LEAST_ROWS, 1 << (head_size - 1).bit_length())


def read_table(path: Path = TABLE) -> tuple[Entry, ...]:
    """The entries of a table; none where the file is not there.

    :raises ConfigError: for a file that is no such table.
    """
    if not path.exists():
        return ()
    try:
        return tuple(_entry(given) for given in json.loads(path.read_text())["entries"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is no table of kernel configurations: {type(error).__name__}: {error}; regenerate it with "
            "makeready bench tune --write, or delete it",
            option="--table",
            value=str(path),
            expected="a table written by makeready bench tune",
        ) from error


def write_table(entries: Sequence[Entry], path: Path = TABLE) -> None:
    """Write a table, one entry a line."""
    lines = ",\n".join("  " + json.dumps(entry.to_dict()) for entry in sorted(entries, key=lambda entry: entry.key))
    partial = path.with_name(path.name + ".partial")
    partial.write_text(f'{{"written by": "makeready bench tune", "entries": [\n{lines}\n]}}\n')
    partial.replace(path)


def merged(old: Iterable[Entry], new: Iterable[Entry]) -> tuple[Entry, ...]:
    """``old`` with the entries of ``new`` in place of those that answer the same question."""
    return tuple({entry.key: entry for entry in (*old, *new)}.values())


def _entry(given: Mapping[str, Any]) -> Entry:
    kind = {"decode": DecodeConfig, "prefill": PrefillConfig}[given["kind"]]
    return Entry(**{**given, "config": kind(**given["config"])})
