"""Options for torch's kernels: plain numbers that fit the mask's small KV blocks."""

from __future__ import annotations

from typing import Any

from ...config import AttentionConfig
from ...device import DeviceFacts
from .settings import FlexSettings
from .tiles import Tile, decode_tile, invariant_tile, prefill_tile

CPU_OPTIONS = {"PARTITION_SIZE": 100}
"""At a multiple of the KV block, torch may take a decode template whose work grows with the whole cache."""


def decode_options(
    settings: FlexSettings, queries: int, *, split: bool, wave: bool = False, wide: bool = False
) -> dict[str, Any]:
    """The options of rows that hold the query heads of a KV head, for one query token or a few.

    :param queries: query rows: tokens times query heads a KV head.
    :param split: whether requests are split over several rows.
    :param wave: whether unsplit requests are about one program a multiprocessor.
    :param wide: whether the view of K is longer than 32 bits can address (TMA addresses tokens, not elements).
    """
    size, width = settings.head_size, settings.element_bytes
    if settings.batch_invariant:
        options = _invariant(settings, size, width, prefill=False)
        return options | {"USE_TMA": options["USE_TMA"] or wide}
    tile = decode_tile(size, width, settings.kernel_block_size, split=split, wave=wave)
    rows = max(tile.block_m, 1 << (queries - 1).bit_length())
    return _options(tile, settings, min(rows, settings.mask_query_block), wide=wide)


def run_options(settings: FlexSettings, *, contiguous: bool) -> dict[str, Any]:
    """The options of full rows of long queries over a run of K and V, whose length is a multiple of its blocks.

    :param contiguous: whether each list of blocks is one run.
    """
    tile = prefill_tile(settings.head_size, settings.element_bytes)
    return _options(tile, settings, min(tile.block_m, settings.mask_query_block)) | {
        "IS_DIVISIBLE": True,
        "PRESCALE_QK": tile.prescale,
        "BLOCKS_ARE_CONTIGUOUS": contiguous,
    }


def page_options(settings: FlexSettings, row_length: int, head_size: int, element_bytes: int) -> dict[str, Any]:
    """The options of rows of query tokens over kernel blocks.

    :param row_length: query tokens of a row.
    """
    if settings.on_cpu:
        return dict(CPU_OPTIONS)
    if settings.batch_invariant:
        return _invariant(settings, head_size, element_bytes, prefill=True)
    large = head_size > 128
    rows, columns = (32, 32) if element_bytes == 4 else (64, 64)
    rows, columns = (rows // 2, columns // 2) if large else (rows, columns)
    tile = Tile(block_m=rows, block_n=columns, warps=4, stages=2)
    return _options(tile, settings, min(rows, settings.mask_query_block, max(16, row_length)))


def _invariant(settings: FlexSettings, head_size: int, element_bytes: int, *, prefill: bool) -> dict[str, Any]:
    kernel_block, query_block = settings.kernel_block_size, settings.mask_query_block
    return invariant_options(
        settings.device, head_size, element_bytes, kernel_block, query_block, settings, prefill=prefill
    )


def invariant_options(
    device: DeviceFacts,
    head_size: int,
    element_bytes: int,
    kernel_block: int,
    query_block: int,
    config: AttentionConfig | FlexSettings,
    *,
    prefill: bool = True,
) -> dict[str, Any]:
    """The options of every query under batch invariance, and of the training pass that has the same bits.

    :param config: whose tiles go before those of the table.
    :param prefill: for long queries; what differs changes no bits.
    """
    if device.device_type == "cpu":
        return dict(CPU_OPTIONS)
    tile_m, tile_n = (
        (config.tile_m, config.tile_n)
        if isinstance(config, FlexSettings)
        else (config.flex_attn_block_m, config.flex_attn_block_n)
    )
    tile = invariant_tile(head_size, element_bytes, kernel_block, prefill=prefill)
    return {
        "FORCE_USE_FLEX_ATTENTION": True,
        # Else torch compiles lengths that 128 divides without bounds checks, and those round differently.
        "IS_DIVISIBLE": False,
        "BLOCK_M": tile_m or min(tile.block_m, query_block),
        "BLOCK_N": tile_n or min(tile.block_n, kernel_block),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "USE_TMA": tile.tma,
    }


def _options(tile: Tile, settings: FlexSettings, rows: int, *, wide: bool = False) -> dict[str, Any]:
    return {
        # The decode template ties its splits to the length of the whole cache, and its batch to one compilation.
        "FORCE_USE_FLEX_ATTENTION": True,
        "BLOCK_M": settings.tile_m or rows,
        "BLOCK_N": min(settings.tile_n or tile.block_n, settings.kernel_block_size),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "USE_TMA": tile.tma or wide,
    }
