"""Block masks from the block table: lists of physical kernel blocks, and a mask for the ragged ones only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...cache.staging import stage
from ...errors import BackendError
from .rows import BlockRange, RowGroup, visited_blocks
from .settings import FlexSettings
from .views import FlatCache

Modifier = Callable[..., torch.Tensor]


@dataclass(frozen=True, slots=True)
class BlockLists:
    """What one kernel call visits. R rows, padded; C kernel blocks of the flat cache."""

    masked_counts: torch.Tensor
    """(R, 1, 1) int32."""
    masked: torch.Tensor
    """(R, 1, 1, C) int32, of which only the first ``masked_counts`` of each row mean anything."""
    whole_counts: torch.Tensor
    whole: torch.Tensor
    mask: Modifier


def block_lists(
    group: RowGroup,
    block_table: torch.Tensor,
    cache: FlatCache,
    settings: FlexSettings,
    causal: bool,
    window: int | None,
) -> BlockLists:
    """The lists and the mask of ``group``. Built on the device from host integers: nothing waits for it.

    :raises BackendError: when a sequence is longer than the settings were made for.
    """
    kernel_block, device = settings.kernel_block_size, block_table.device
    ranges = [visited_blocks(row, kernel_block, causal, window) for row in group.rows]
    _check_length(ranges, settings)
    padding = settings.batch_rows(len(ranges)) - len(ranges)
    facts = [
        (row.request, row.position, row.seq_len, span.first, span.full, span.tail, span.end)
        for row, span in zip(group.rows, ranges, strict=True)
    ] + [(0,) * 7] * padding
    columns = [number for column in zip(*facts, strict=True) for number in column]
    request, position, seq_len, first, full, tail, end = stage(columns, torch.int32, device).view(7, len(facts))
    per_block = cache.block_size // kernel_block
    tables = block_table[request.long()]
    head = full - first

    def physical(place: torch.Tensor) -> torch.Tensor:
        column = (place // per_block).clamp(max=tables.shape[1] - 1).long()
        block = tables.gather(1, column)
        return block * (cache.block_stride // kernel_block) + place % per_block

    width = max(span.tail - span.full for span in ranges)
    whole = full[:, None] + torch.arange(width, dtype=torch.int32, device=device)
    width = max(span.full - span.first + span.end - span.tail for span in ranges)
    column = torch.arange(width, dtype=torch.int32, device=device)
    masked = torch.where(column < head[:, None], first[:, None] + column, (tail - head)[:, None] + column)
    return BlockLists(
        (head + end - tail).view(-1, 1, 1),
        _spread(physical(masked), cache, settings),
        (tail - full).view(-1, 1, 1),
        _spread(physical(whole), cache, settings),
        _mask(_places(tables, first, end, per_block, cache), position, seq_len, cache, causal, window),
    )


def _check_length(ranges: list[BlockRange], settings: FlexSettings) -> None:
    longest = max(span.end for span in ranges)
    if longest > settings.max_blocks_per_row:
        raise BackendError(
            f"a sequence of {longest} kernel blocks of {settings.kernel_block_size} tokens is longer "
            f"than the {settings.max_blocks_per_row} that flex was built for",
            option="max_model_len",
            value=longest * settings.kernel_block_size,
            expected=f"<= {settings.max_blocks_per_row * settings.kernel_block_size}",
        )


def _spread(blocks: torch.Tensor, cache: FlatCache, settings: FlexSettings) -> torch.Tensor:
    """(R, W) as (R, 1, 1, C): torch wants a column for every kernel block of the cache.

    Strides are the same in every step. Rows overlap in memory, so this costs R rows of the longest sequence
    and not R caches. Only the W columns are written; the counts say how many of them are read.
    """
    rows, width = blocks.shape
    stride = settings.max_blocks_per_row
    columns = ((cache.num_blocks - 1) * cache.block_stride + cache.block_size) // settings.kernel_block_size
    store = torch.empty(rows * stride + columns, dtype=torch.int32, device=blocks.device)
    store[: rows * stride].view(rows, stride)[:, :width] = blocks
    return store.as_strided((rows, 1, 1, columns), (stride, stride, stride, 1))


def _places(
    tables: torch.Tensor, first: torch.Tensor, end: torch.Tensor, per_block: int, cache: FlatCache
) -> torch.Tensor:
    """(num_blocks + 1,) int32: where in its sequence each visited block stands.

    One map serves all requests: a block that several share is a common prefix, at the same place in each.
    Entries outside a row's range may name blocks that somebody else has by now: the last element takes them.
    """
    column = torch.arange(tables.shape[1], dtype=torch.int32, device=tables.device)
    live = (column >= (first // per_block)[:, None]) & (column < (-(-end // per_block))[:, None])
    targets = torch.where(live, tables, cache.num_blocks).long()
    places = torch.empty(cache.num_blocks + 1, dtype=torch.int32, device=tables.device)
    return places.index_put_((targets,), column.expand_as(targets))


def _mask(
    places: torch.Tensor,
    position: torch.Tensor,
    seq_len: torch.Tensor,
    cache: FlatCache,
    causal: bool,
    window: int | None,
) -> Modifier:
    """The mask of ragged blocks, by logical positions of the row's queries and the physical token's owner."""
    stride, block_size = cache.block_stride, cache.block_size

    def mask(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        key_position = places[kv // stride] * block_size + kv % stride
        distance = position[b] + q - key_position
        seen = distance >= 0 if causal else key_position < seq_len[b]
        if window is not None:
            seen = seen & (distance < window)
            if not causal:
                seen = seen & (distance > -window)
        return seen

    return mask


def soft_cap_modifier(soft_cap: float) -> Modifier:
    """Scores squeezed into ``(-soft_cap, soft_cap)``."""

    def cap(score: torch.Tensor, b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        return soft_cap * torch.tanh(score / soft_cap)

    return cap
