"""Options for torch's kernels: plain numbers that fit the mask's small KV blocks."""

from __future__ import annotations

from typing import Any

from .settings import FlexSettings


def kernel_options(
    settings: FlexSettings, row_length: int, group_size: int, head_size: int, element_bytes: int
) -> dict[str, Any]:
    """The options of one kernel call.

    :param row_length: query tokens of a row.
    :param group_size: query heads a KV head.
    """
    if settings.on_cpu:
        # At a multiple of the KV block, torch may take a decode template whose work grows with
        # the whole cache.
        return {"PARTITION_SIZE": 100}
    if row_length == 1 and group_size & (group_size - 1) == 0:
        # The decode template packs a group's heads into its rows, so the user's rows of queries do not apply.
        return {} if settings.tile_n is None else {"BLOCK_N": settings.tile_n}
    large = head_size > 128
    rows, columns = (32, 32) if element_bytes == 4 else (64, 64)
    rows, columns = (rows // 2, columns // 2) if large else (rows, columns)
    return {
        "FORCE_USE_FLEX_ATTENTION": True,
        "BLOCK_M": settings.tile_m or min(rows, settings.mask_query_block, max(16, row_length)),
        "BLOCK_N": settings.tile_n or min(columns, settings.kernel_block_size),
        "num_warps": 4,
        "num_stages": 2,
    }
