"""Block lists by plain torch: for any device and any rows, from host integers."""

from __future__ import annotations

import torch

from ...cache.staging import stage
from ...errors import BackendError
from ..interface import AttentionCall
from .masks import BlockLists, RowFacts
from .rows import BlockRange, RowGroup, visited_blocks
from .settings import FlexSettings
from .views import FlatCache


def block_lists(
    group: RowGroup, block_table: torch.Tensor, cache: FlatCache, settings: FlexSettings, call: AttentionCall
) -> BlockLists:
    """The lists of ``group``. Built on the device from host integers: nothing waits for it.

    With the user's own mask every visited block is a masked one.

    :raises BackendError: when a sequence is longer than the settings were made for.
    """
    kernel_block, device = settings.kernel_block_size, block_table.device
    ranges = [visited_blocks(row, kernel_block, call.causal, call.sliding_window, settings.order) for row in group.rows]
    if call.mask_mod is not None:
        ranges = [BlockRange(span.first, span.end, span.end, span.end) for span in ranges]
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
        RowFacts(position, seq_len, request, _places(tables, first, end, per_block, cache)),
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
    """(R, W) as (R, 1, 1, C): torch's C++ kernel wants a column for every kernel block of the cache.

    Strides are the same in every step and every list (torch 2.11 walks the whole blocks with the strides of the
    masked ones). Rows overlap in memory, so this costs R rows of the longest sequence and not R caches. Only the W
    columns are written, and a null block after them: the kernel looks one ahead. The counts say how many are read.
    """
    rows, width = blocks.shape
    stride = -(-(settings.max_blocks_per_row + 1) // 4) * 4
    columns = stride
    if settings.on_cpu:
        columns = ((cache.num_blocks - 1) * cache.block_stride + cache.block_size) // settings.kernel_block_size
    store = torch.empty(rows * stride + columns, dtype=torch.int32, device=blocks.device)
    table = store[: rows * stride].view(rows, stride)
    table[:, :width] = blocks
    table[:, width] = 0
    return store.as_strided((rows, 1, 1, columns), (stride, stride, stride, 1))


def _places(
    tables: torch.Tensor, first: torch.Tensor, end: torch.Tensor, per_block: int, cache: FlatCache
) -> torch.Tensor:
    """Where visited blocks stand; see :class:`RowFacts`.

    Entries outside a row's range may name blocks that somebody else has by now: the last element takes them.
    """
    column = torch.arange(tables.shape[1], dtype=torch.int32, device=tables.device)
    live = (column >= (first // per_block)[:, None]) & (column < (-(-end // per_block))[:, None])
    targets = torch.where(live, tables, cache.num_blocks).long()
    places = torch.empty(cache.num_blocks + 1, dtype=torch.int32, device=tables.device)
    return places.index_put_((targets,), column.expand_as(targets))
