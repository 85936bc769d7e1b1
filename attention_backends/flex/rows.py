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


def split_rows(
    query_lens: Sequence[int], seq_lens: Sequence[int], row_lengths: Sequence[int], align: int = 1
) -> tuple[RowGroup, ...]:
    """Rows of a step: single tokens in one group, longer queries in another whose length fits the longest.

    :param align: rows end at positions that are multiples of this, so that a chunk is cut where the whole would be.
    """
    singles: list[tuple[int, int, int, int]] = []
    longer: list[tuple[int, int, int, int]] = []
    token = 0
    for request, (q_len, seq_len) in enumerate(zip(query_lens, seq_lens, strict=True)):
        if q_len:
            (singles if q_len == 1 else longer).append((request, token, q_len, seq_len))
        token += q_len
    if len(row_lengths) == 1:
        singles, longer = [], sorted(singles + longer)
    groups = []
    for queries in (singles, longer):
        if queries:
            most = max(q_len for _, _, q_len, _ in queries)
            length = next((size for size in row_lengths if size >= most), row_lengths[-1])
            groups.append(RowGroup(length, tuple(row for query in queries for row in _cut(query, length, align))))
    return tuple(groups)


def _cut(query: tuple[int, int, int, int], length: int, align: int) -> list[Row]:
    request, token, q_len, seq_len = query
    rows, done = [], 0
    while done < q_len:
        position = seq_len - q_len + done
        count = min(length, q_len - done)
        if align > 1:
            count = min(count, align - position % align)
        rows.append(Row(request, token + done, max(position, 0), count, seq_len))
        done += count
    return rows


def visited_blocks(
    row: Row, kernel_block: int, causal: bool, window: int | None, order: tuple[int, int] | None = None
) -> BlockRange:
    """The kernel blocks of ``row``; without ``causal`` a window reaches as far ahead as it reaches back.

    :param order: (query, KV) block of a mask over the whole sequence: its blocks, not the row's, decide which kernel
        blocks are whole, so that every query of the tile visits them in the order of that mask.
    """
    if order is not None:
        return _in_order(row, kernel_block, causal, window, order)
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


def _in_order(row: Row, kernel_block: int, causal: bool, window: int | None, order: tuple[int, int]) -> BlockRange:
    query_block, kv_block = order
    start = row.position // query_block * query_block
    tile = visited_blocks(Row(row.request, row.token, start, query_block, row.seq_len), kv_block, causal, window)
    own = visited_blocks(row, kernel_block, causal, window)
    if tile.full == tile.tail == tile.end:
        return BlockRange(own.first, own.end, own.end, own.end)
    # Blocks that only other queries of the tile see change nothing for this row, and may belong to another request.
    each = kv_block // kernel_block
    full, tail = (min(max(place * each, own.first), own.end) for place in (tile.full, tile.tail))
    return BlockRange(own.first, full, tail, own.end)
