"""A step as rows of equal length that never mix requests, and the kernel blocks each row visits. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """Query tokens of one request that one row of a batch computes."""

    request: int
    token: int
    """The first of them, counted over the step."""
    position: int
    """Its position in the request's sequence."""
    count: int
    seq_len: int


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows that one kernel call computes together, each padded to ``length`` query tokens."""

    length: int
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class BlockRange:
    """Kernel blocks that a row visits, by their place in the sequence: ``first <= full <= tail <= end``.

    ``[full, tail)`` is seen whole by every query of the row; ``[first, full)`` (a window's ragged start)
    and ``[tail, end)`` (the diagonal, or the ragged end) need the mask.
    """

    first: int
    full: int
    tail: int
    end: int


def split_rows(query_lens: Sequence[int], seq_lens: Sequence[int], row_lengths: Sequence[int]) -> tuple[RowGroup, ...]:
    """Rows of a step: single tokens in one group, longer queries in another whose length fits the longest."""
    singles: list[tuple[int, int, int, int]] = []
    longer: list[tuple[int, int, int, int]] = []
    token = 0
    for request, (q_len, seq_len) in enumerate(zip(query_lens, seq_lens, strict=True)):
        if q_len:
            (singles if q_len == 1 else longer).append((request, token, q_len, seq_len))
        token += q_len
    groups = []
    for queries in (singles, longer):
        if queries:
            most = max(q_len for _, _, q_len, _ in queries)
            length = next((size for size in row_lengths if size >= most), row_lengths[-1])
            groups.append(RowGroup(length, tuple(row for query in queries for row in _cut(query, length))))
    return tuple(groups)


def _cut(query: tuple[int, int, int, int], length: int) -> list[Row]:
    request, token, q_len, seq_len = query
    return [
        Row(request, token + done, seq_len - q_len + done, min(length, q_len - done), seq_len)
        for done in range(0, q_len, length)
    ]


def visited_blocks(row: Row, kernel_block: int, causal: bool, window: int | None) -> BlockRange:
    """The kernel blocks of ``row``; without ``causal`` a window reaches as far ahead as it reaches back."""
    last = row.position + row.count - 1
    ahead = row.seq_len - 1 if window is None else last + window - 1
    end_key = last if causal else min(row.seq_len - 1, ahead)
    whole_to = row.position if causal else row.seq_len - 1
    if not causal and window is not None:
        whole_to = min(whole_to, row.position + window - 1)
    end = end_key // kernel_block + 1
    tail = min(end, (whole_to + 1) // kernel_block)
    if window is None:
        return BlockRange(0, 0, tail, end)
    first = max(0, row.position - window + 1) // kernel_block
    whole_from = max(0, last - window + 1)
    full = max(first, -(-whole_from // kernel_block))
    # A window narrower than a block leaves no whole block: everything visited is masked.
    return BlockRange(first, full, tail, end) if full <= tail else BlockRange(first, end, end, end)
