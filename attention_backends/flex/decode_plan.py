"""Which requests of a step are decoded, and in how many rows. Host integers only; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .settings import FlexSettings
from .tiles import FEWEST_ROWS, LONGEST_ROW_BYTES, MANY_PROGRAMS, one_wave

H200_UNITS = 132
"""Multiprocessors where nobody said."""
PACKED_ROWS = 64
"""Query rows (tokens times query heads a KV head) up to which a query is packed like a decode."""


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Units (the query tokens of one request each) and the rows that they are split into."""

    requests: tuple[int, ...]
    """Of each unit, in the order of the step."""
    length: int
    """Query tokens of a unit, at most."""
    rows: int
    """Rows that the kernels are launched for, whatever the lengths; at least one a unit."""
    whole_step: bool
    """True if unit ``i`` is request ``i`` and query token ``i``, for all of the step."""

    @property
    def units(self) -> int:
        """How many there are."""
        return len(self.requests)

    @property
    def split(self) -> bool:
        """Whether units may take several rows."""
        return self.rows > max(self.units, FEWEST_ROWS)


def plan_decode(query_lens: Sequence[int], seq_lens: Sequence[int], settings: FlexSettings) -> DecodePlan | None:
    """The requests whose few query tokens are packed with their heads, or ``None`` if there are none.

    :param seq_lens: of the requests; upper bounds do, when the step is captured.
    """
    most = 1 if settings.batch_invariant else longest_packed(settings.group_size)
    requests = tuple(index for index, count in enumerate(query_lens) if 0 < count <= most)
    if not requests:
        return None
    length = max(query_lens[index] for index in requests)
    length = 1 << (length - 1).bit_length()
    whole = length == 1 and len(requests) == len(query_lens)
    longest = max(seq_lens[index] for index in requests)
    return DecodePlan(requests, length, decode_rows(len(requests), longest, settings), whole)


def longest_packed(group: int) -> int:
    """The most query tokens of a unit: a power of two, as units are made, and no more than :data:`PACKED_ROWS` rows."""
    fitting = max(1, PACKED_ROWS // group)
    return 1 << (fitting.bit_length() - 1)


def decode_rows(units: int, longest: int, settings: FlexSettings) -> int:
    """Rows for ``units``, the longest of ``longest`` tokens: one each, and more where splits pay.

    Splits cost two small kernels (6 of 250 us at 64 x 4k), so a large batch of short sequences does without.
    """
    row_bytes = longest * (settings.head_size + settings.head_size_v) * settings.element_bytes
    programs = units * settings.num_kv_heads
    fill = programs >= MANY_PROGRAMS or (settings.kernel_block_size > 16 and fills_once(units, settings))
    if settings.batch_invariant or (fill and row_bytes <= LONGEST_ROW_BYTES):
        return max(units, FEWEST_ROWS)
    # Rows that stay empty cost: as many as fill the device, and half of that where the batch alone has them.
    return max(settings.extra_rows, units + -(-settings.extra_rows // 2), FEWEST_ROWS)


def fills_once(units: int, settings: FlexSettings) -> bool:
    """Whether ``units`` unsplit are about one program a multiprocessor."""
    return one_wave(units * settings.num_kv_heads, settings.device.compute_units or H200_UNITS, settings.head_size)
