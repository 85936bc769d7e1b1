"""Long queries on CUDA: K and V of their requests are gathered into one run, which full-size tiles then read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ...cache.staging import stage
from ..metadata import StepMetadata
from .row_batch import RowBatch, row_batch
from .rows import RowGroup, split_rows
from .settings import FlexSettings
from .tiles import prefill_tile
from .views import FlatCache

CHUNK = 128
"""Tokens that requests are padded to in the run."""


@dataclass(frozen=True, slots=True)
class Run:
    """Requests whose K and V share one run, and their queries."""

    settings: FlexSettings
    """As for a cache whose blocks are those of the run."""
    rows: RowBatch
    table: torch.Tensor
    """(B, blocks) int32: block ids of the run, of each request that is in it."""
    chunks: torch.Tensor
    """(3, chunks) int32: request, first token in the request, length of the request."""
    block_table: torch.Tensor
    """Of the paged cache."""

    @property
    def num_tokens(self) -> int:
        """Of the run."""
        return int(self.chunks.shape[1]) * CHUNK


def plan_runs(
    query_lens: Sequence[int], seq_lens: Sequence[int], requests: Sequence[int], limit: int
) -> tuple[tuple[int, ...], ...]:
    """``requests`` in batches whose padded lengths come to ``limit`` tokens at most, or to one request."""
    batches: list[list[int]] = []
    room = 0
    for request in requests:
        tokens = -(-seq_lens[request] // CHUNK) * CHUNK
        if not batches or tokens > room:
            batches.append([])
            room = limit
        batches[-1].append(request)
        room -= tokens
    return tuple(tuple(batch) for batch in batches)


def build_run(step: StepMetadata, requests: Sequence[int], settings: FlexSettings) -> Run:
    """The run of ``requests`` and the rows of their queries."""
    tile = prefill_tile(settings.head_size, settings.element_bytes)
    device = step.block_table.device
    ours = set(requests)
    query_lens = [count if index in ours else 0 for index, count in enumerate(step.query_lens_host)]
    query_block = settings.asked_query_block or settings.tile_m or tile.block_m
    kv_block = min(settings.asked_kv_block or settings.tile_n or tile.block_n, CHUNK)
    inner = replace(
        settings,
        block_size=kv_block,
        kernel_block_size=kv_block,
        mask_query_block=query_block,
        row_lengths=(query_block,),
        max_blocks_per_row=-(-settings.max_model_len // CHUNK) * CHUNK // kv_block,
    )
    group = _rows(step, query_lens, query_block)
    first_block = [0] * step.num_requests
    chunks: list[tuple[int, int, int]] = []
    for request in requests:
        length = step.seq_lens_host[request]
        first_block[request] = len(chunks) * (CHUNK // kv_block)
        chunks.extend((request, start, length) for start in range(0, length, CHUNK))
    columns = [number for column in zip(*chunks, strict=True) for number in column]
    longest = max(step.seq_lens_host[request] for request in requests)
    staged = stage([*columns, *first_block], torch.int32, device)
    width = torch.arange(-(-longest // CHUNK) * (CHUNK // kv_block), dtype=torch.int32, device=device)
    return Run(
        inner,
        row_batch(group, inner.batch_rows(len(group.rows)), device, fused=True),
        staged[3 * len(chunks) :, None] + width,
        staged[: 3 * len(chunks)].view(3, -1),
        step.block_table,
    )


def _rows(step: StepMetadata, query_lens: list[int], length: int) -> RowGroup:
    """Rows in the order of their tokens if those follow each other, so that no copy is needed; else longest first."""
    start, rows, token = 0, [], 0
    for request, count in enumerate(step.query_lens_host):
        if query_lens[request]:
            (group,) = split_rows((count,), (step.seq_lens_host[request],), (length,))
            rows += [replace(row, request=request, token=row.token + token) for row in group.rows]
        token += count
    start = rows[0].token
    follow = all(row.token == start + index * length for index, row in enumerate(rows))
    return RowGroup(length, tuple(rows if follow else sorted(rows, key=lambda row: -row.position)))


def gather_run(key_cache: torch.Tensor, value_cache: torch.Tensor, run: Run) -> FlatCache:
    """K and V of the run's requests, in token order, zero past each request's end."""
    from .kernels.pages import gather_pages

    heads, size, size_v = key_cache.shape[2], key_cache.shape[3], value_cache.shape[3]
    keys = key_cache.new_empty(run.num_tokens, heads, size)
    values = value_cache.new_empty(run.num_tokens, heads, size_v)
    tokens, block = 64, run.settings.kernel_block_size
    gather_pages[(run.num_tokens // tokens, heads, 2)](
        key_cache,
        value_cache,
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        run.block_table,
        run.block_table.stride(0),
        run.chunks,
        run.chunks.shape[1],
        keys,
        values,
        HEADS=heads,
        SIZE=size,
        OTHER_SIZE=size_v,
        WIDTH=1 << (max(size, size_v) - 1).bit_length(),
        BLOCK=key_cache.shape[1],
        CHUNK=CHUNK,
        TOKENS=tokens,
        num_warps=4,
    )
    key, value = (part.transpose(0, 1).unsqueeze(0) for part in (keys, values))
    for tensor in (key, value):
        torch._dynamo.mark_dynamic(tensor, 2)
    return FlatCache(key, value, block, run.num_tokens // block, block)
