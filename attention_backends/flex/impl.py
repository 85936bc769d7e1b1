"""Flex on the device: rows of queries, lists of blocks, one compiled kernel call for each group of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from ...cache.staging import stage
from ...errors import BackendError
from ..interface import AttentionCall, AttentionImpl
from ..metadata import StepMetadata
from .compiling import VARIANT_LIMIT, CompiledFlex
from .decode_plan import DecodePlan, plan_decode
from .kernel_options import page_options, run_options
from .lists import block_lists
from .masks import BlockLists, mark_rows, modifiers
from .row_batch import RowBatch, as_tokens, pack, row_batch, unpack
from .rows import split_rows
from .runs import Run, build_run, gather_run, plan_runs
from .settings import FlexSettings
from .views import FlatCache, flatten

if TYPE_CHECKING:
    from .decode import DecodeRows, Kind, RowPool


@dataclass(frozen=True, slots=True)
class FlexMetadata:
    """One step. Block lists depend on a layer's strides and window, and layers of a kind share them."""

    step: StepMetadata
    batches: tuple[RowBatch, ...]
    """Rows that read kernel blocks where they lie."""
    runs: tuple[Run, ...] = ()
    """Long queries, over gathered K and V."""
    decode: DecodePlan | None = None
    rows: dict[Kind, DecodeRows] = field(default_factory=dict)
    lists: dict[tuple[object, ...], BlockLists] = field(default_factory=dict)


class FlexAttention(AttentionImpl):
    """Torch's flex_attention with the cache as one long row of KV that all requests share.

    On CUDA a step has up to three parts. Decodes and other short queries: a row is a request, or a split of one, and
    a KV head's query heads are its query rows. Long queries: K and V are gathered into one run that full-size tiles
    read. Under batch invariance long queries read kernel blocks in place, with the tile of the decodes. On other
    devices everything is rows of query tokens over kernel blocks.
    """

    name = "flex"

    def __init__(self, settings: FlexSettings, variant_limit: int = VARIANT_LIMIT) -> None:
        self.settings = settings
        self.capturable = settings.fused
        self._flex = CompiledFlex(variant_limit)
        self._pools: dict[Kind, RowPool] = {}

    @property
    def compile_count(self) -> int:
        """Kernels compiled so far; constant once every bucket has been seen."""
        return self._flex.compile_count

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the persistent buffers, of all kinds of layer seen so far."""
        return sum(pool.nbytes for pool in self._pools.values())

    def prepare(self, step: StepMetadata) -> FlexMetadata:
        """Rows of the step, and on CUDA, if one kind of layer is all there is, its block lists."""
        if step.block_size != self.settings.block_size:
            raise BackendError(
                f"flex was built for blocks of {self.settings.block_size} tokens, and the step's have "
                f"{step.block_size}",
                option="block_size",
                value=step.block_size,
                expected=self.settings.block_size,
            )
        if not self.settings.fused:
            return _paged(step, self.settings)
        metadata = self._plan(step)
        if metadata.decode is not None and len(self._pools) == 1:
            # Of several kinds this step may need one only; its first layer then asks.
            ((kind, pool),) = self._pools.items()
            metadata.rows[kind] = pool.fill(metadata.decode, step)
        return metadata

    def forward(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        metadata: FlexMetadata,
        call: AttentionCall,
    ) -> torch.Tensor:
        """Attention over the paged cache; shapes as in :class:`AttentionImpl`.

        :raises BackendError: for strides, an address range or a feature that flex cannot serve.
        """
        settings = self.settings
        _check(call, settings)
        query = query if query.stride(-1) == 1 else query.contiguous()
        cache = flatten(key_cache, value_cache, settings.kernel_block_size, settings.max_view_elements)
        parts = len(metadata.batches) + len(metadata.runs) + (metadata.decode is not None)
        output = None
        if parts != 1 or 0 in metadata.step.query_lens_host or _padded(metadata.step):
            output = query.new_zeros(*query.shape[:2], value_cache.shape[-1])
        for run in metadata.runs:
            whole = gather_run(key_cache, value_cache, run)
            options = run_options(run.settings, contiguous=call.sliding_window is None and call.mask_mod is None)
            output = self._batch(query, whole, run.rows, run.table, metadata, run.settings, options, call, output)
        for batch in metadata.batches:
            options = page_options(settings, batch.group.length, query.shape[-1], query.element_size())
            table = metadata.step.block_table
            output = self._batch(query, cache, batch, table, metadata, settings, options, call, output)
        if metadata.decode is not None:
            output = self._decode(query, cache, metadata, call, output)
        if output is None:
            output = query.new_zeros(*query.shape[:2], value_cache.shape[-1])
        return output if call.value_scale == 1.0 else output * call.value_scale

    def forward_gathered(
        self,
        query: torch.Tensor,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        step: StepMetadata,
        call: AttentionCall,
    ) -> torch.Tensor:
        """The same over K and V that were gathered: they are laid out as a small cache of kernel blocks."""
        _check(call, self.settings)
        size = self.settings.kernel_block_size
        settings = replace(self.settings, block_size=size)
        counts = [-(-len(key) // size) for key in keys]
        tables, start = [], 0
        for count in counts:
            tables.append(list(range(start, start + count)))
            start += count
        num_blocks = max(16, 1 << max(start - 1, 0).bit_length())
        width = max(counts)
        padded = [block for table in tables for block in (*table, *[0] * (width - len(table)))]
        table = stage(padded, torch.int32, query.device).view(len(tables), width)
        cache = FlatCache(
            _lay_out(keys, counts, num_blocks, size),
            _lay_out(values, counts, num_blocks, size),
            size,
            num_blocks,
            size,
        )
        metadata = _paged(replace(step, block_table=table, block_size=size), settings)
        output = query.new_zeros(*query.shape[:2], cache.value.shape[-1])
        for batch in metadata.batches:
            options = page_options(settings, batch.group.length, query.shape[-1], query.element_size())
            self._batch(query, cache, batch, table, metadata, settings, options, call, output)
        return output

    def _plan(self, step: StepMetadata) -> FlexMetadata:
        settings = self.settings
        decode = plan_decode(step.query_lens_host, step.seq_lens_host, settings)
        packed = set(decode.requests) if decode else set()
        longer = [index for index, count in enumerate(step.query_lens_host) if count and index not in packed]
        if not longer:
            return FlexMetadata(step, (), (), decode)
        if settings.batch_invariant:
            return replace(_paged(step, settings, packed), decode=decode)
        batches = plan_runs(step.query_lens_host, step.seq_lens_host, longer, settings.run_tokens)
        return FlexMetadata(step, (), tuple(build_run(step, batch, settings) for batch in batches), decode)

    def _decode(
        self,
        query: torch.Tensor,
        cache: FlatCache,
        metadata: FlexMetadata,
        call: AttentionCall,
        output: torch.Tensor | None,
    ) -> torch.Tensor:
        from .decode import Kind, RowPool, attend_rows

        assert metadata.decode is not None
        kind = Kind(cache.block_stride, cache.num_blocks, call.causal, call.sliding_window, call.mask_mod is not None)
        if kind not in metadata.rows:
            if kind not in self._pools:
                self._pools[kind] = RowPool(self.settings, kind, query.device)
            metadata.rows[kind] = self._pools[kind].fill(metadata.decode, metadata.step)
        return attend_rows(self._flex, query, cache, metadata.rows[kind], self.settings, call, output)

    def _batch(
        self,
        query: torch.Tensor,
        cache: FlatCache,
        batch: RowBatch,
        table: torch.Tensor,
        metadata: FlexMetadata,
        settings: FlexSettings,
        options: dict[str, object],
        call: AttentionCall,
        output: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of one batch of rows, into ``output`` or a new tensor."""
        key = (
            id(batch), cache.block_stride, cache.num_blocks, call.causal, call.sliding_window, call.mask_mod is None
        )  # fmt: skip
        if key not in metadata.lists:
            metadata.lists[key] = block_lists(batch.group, table, cache, settings, call)
        lists = metadata.lists[key]
        rows = pack(query, batch)
        if settings.fused:
            mark_rows(lists)
            torch._dynamo.mark_dynamic(rows, 0)
        mask, score = modifiers(lists.facts, cache, call, 1, settings.kernel_block_size)
        blocks = (settings.mask_query_block, settings.kernel_block_size)
        with_sinks, scale = call.sinks is not None, call.scale * call.key_scale
        out, lse = self._flex(rows, cache.key, cache.value, lists, mask, score, blocks, scale, options, with_sinks)
        if call.sinks is not None and lse is not None:
            # A sink is one more logit below the softmax: it only scales the sum.
            out = out * torch.sigmoid(lse - call.sinks.float().view(1, -1, 1)).unsqueeze(-1).to(out.dtype)
        tokens = as_tokens(out, batch, len(query)) if output is None else None
        if tokens is not None:
            return tokens
        if output is None:
            output = query.new_zeros(*query.shape[:2], out.shape[-1])
        unpack(out, batch, output)
        return output


def _check(call: AttentionCall, settings: FlexSettings) -> None:
    if call.sinks is not None and not settings.sinks:
        raise BackendError(
            f"flex on {settings.device.device_type} has no attention sinks: torch's compiled kernel "
            "there does not return the log-sum-exp that they need",
            option="sinks",
        )


def _padded(step: StepMetadata) -> bool:
    """Whether there are rows that only fill the batch; in a captured step the decode kernels write them."""
    return not step.captured and 0 in step.seq_lens_host


def _paged(step: StepMetadata, settings: FlexSettings, done: set[int] | None = None) -> FlexMetadata:
    """Rows over kernel blocks for all requests but those in ``done`` and those that have no tokens."""
    device, done = step.block_table.device, done or set()
    query_lens = step.query_lens_host
    rows = []
    for group in split_rows(query_lens, step.seq_lens_host, settings.row_lengths, settings.align):
        kept = tuple(row for row in group.rows if row.request not in done and row.seq_len)
        if kept:
            group = replace(group, rows=kept)
            rows.append(row_batch(group, settings.batch_rows(len(kept)), device, fused=settings.fused))
    return FlexMetadata(step, tuple(rows))


def _lay_out(parts: Sequence[torch.Tensor], counts: Sequence[int], num_blocks: int, size: int) -> torch.Tensor:
    """Parts (seq_len, Hk, D), each from a block's start, as (1, Hk, num_blocks * size, D); else zero."""
    flat = parts[0].new_zeros(num_blocks * size, *parts[0].shape[1:])
    start = 0
    for part, count in zip(parts, counts, strict=True):
        flat[start : start + len(part)] = part
        start += count * size
    return flat.transpose(0, 1).unsqueeze(0)
