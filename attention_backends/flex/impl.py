"""Flex on the device: rows of queries, lists of blocks, one compiled kernel call for each group of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from ...cache.staging import stage
from ...errors import BackendError
from ..interface import AttentionCall, AttentionImpl
from ..metadata import StepMetadata
from .compiling import VARIANT_LIMIT, CompiledFlex
from .kernel_options import kernel_options
from .masks import BlockLists, block_lists, soft_cap_modifier
from .rows import RowGroup, split_rows
from .settings import FlexSettings
from .views import FlatCache, flatten


@dataclass(frozen=True, slots=True)
class GroupTensors:
    """A row group and where its query tokens stand, on the device."""

    group: RowGroup
    batch_rows: int
    tokens: torch.Tensor
    """(n,) int64: rows of the step's query tensor."""
    places: torch.Tensor
    """(n,) int64: where they stand in the padded rows."""


@dataclass(frozen=True, slots=True)
class FlexMetadata:
    """One step. Block lists depend on a layer's strides and window, and layers of a kind share them."""

    block_table: torch.Tensor
    groups: tuple[GroupTensors, ...]
    lists: dict[tuple[object, ...], BlockLists] = field(default_factory=dict)


class FlexAttention(AttentionImpl):
    """Torch's flex_attention with the cache as one long row of KV that all requests share."""

    name = "flex"

    def __init__(self, settings: FlexSettings, variant_limit: int = VARIANT_LIMIT) -> None:
        self.settings = settings
        self._flex = CompiledFlex(variant_limit)

    @property
    def compile_count(self) -> int:
        """Kernels compiled so far; constant once every bucket has been seen."""
        return self._flex.compile_count

    def prepare(self, step: StepMetadata) -> FlexMetadata:
        """Rows of the step; what depends on a layer is added when its first layer asks."""
        if step.block_size != self.settings.block_size:
            raise BackendError(
                f"flex was built for blocks of {self.settings.block_size} tokens, and the step's have "
                f"{step.block_size}",
                option="block_size",
                value=step.block_size,
                expected=self.settings.block_size,
            )
        return _metadata(step, self.settings)

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
        cache = flatten(key_cache, value_cache, settings.kernel_block_size, settings.max_view_elements)
        return self._attend(query, cache, metadata, settings, call)

    def forward_gathered(
        self,
        query: torch.Tensor,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        step: StepMetadata,
        call: AttentionCall,
    ) -> torch.Tensor:
        """The same over K and V that were gathered: they are laid out as a small cache of kernel blocks."""
        size = self.settings.kernel_block_size
        settings = replace(self.settings, block_size=size)
        counts = [-(-len(key) // size) for key in keys]
        tables, start = [], 0
        for count in counts:
            tables.append(list(range(start, start + count)))
            start += count
        num_blocks = max(16, 1 << (start - 1).bit_length())
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
        metadata = _metadata(replace(step, block_table=table, block_size=size), settings)
        return self._attend(query, cache, metadata, settings, call)

    def _attend(
        self,
        query: torch.Tensor,
        cache: FlatCache,
        metadata: FlexMetadata,
        settings: FlexSettings,
        call: AttentionCall,
    ) -> torch.Tensor:
        if call.sinks is not None and not settings.sinks:
            raise BackendError(
                f"flex on {settings.device.device_type} has no attention sinks: torch's compiled kernel "
                "there does not return the log-sum-exp that they need",
                option="sinks",
            )
        output = query.new_empty(*query.shape[:2], cache.value.shape[-1])
        for index, group in enumerate(metadata.groups):
            key = (index, cache.block_stride, cache.num_blocks, call.causal, call.sliding_window)
            if key not in metadata.lists:
                metadata.lists[key] = block_lists(
                    group.group, metadata.block_table, cache, settings, call.causal, call.sliding_window
                )
            output[group.tokens] = self._rows(query, cache, group, metadata.lists[key], settings, call)
        return output

    def _rows(
        self,
        query: torch.Tensor,
        cache: FlatCache,
        group: GroupTensors,
        lists: BlockLists,
        settings: FlexSettings,
        call: AttentionCall,
    ) -> torch.Tensor:
        """Attention of one group of rows: (n, Hq, Dv) for its n tokens."""
        length, num_heads, head_size = group.group.length, *query.shape[1:]
        rows = query.new_zeros(group.batch_rows * length, num_heads, head_size)
        rows[group.places] = query[group.tokens]
        out, lse = self._flex(
            rows.view(group.batch_rows, length, num_heads, head_size).transpose(1, 2),
            cache.key,
            cache.value,
            lists,
            (settings.mask_query_block, settings.kernel_block_size),
            soft_cap_modifier(call.soft_cap) if call.soft_cap is not None else None,
            call.scale,
            kernel_options(settings, length, num_heads // cache.key.shape[1], head_size, query.element_size()),
            call.sinks is not None,
        )
        if call.sinks is not None and lse is not None:
            # A sink is one more logit below the softmax: it only scales the sum.
            out = out * torch.sigmoid(lse - call.sinks.float().view(1, -1, 1)).unsqueeze(-1).to(out.dtype)
        return out.transpose(1, 2).reshape(group.batch_rows * length, num_heads, -1)[group.places]


def _metadata(step: StepMetadata, settings: FlexSettings) -> FlexMetadata:
    device = step.block_table.device
    groups = split_rows(step.query_lens_host, step.seq_lens_host, settings.row_lengths)
    return FlexMetadata(step.block_table, tuple(_group_tensors(group, settings, device) for group in groups))


def _group_tensors(group: RowGroup, settings: FlexSettings, device: torch.device) -> GroupTensors:
    tokens: list[int] = []
    places: list[int] = []
    for index, row in enumerate(group.rows):
        tokens.extend(range(row.token, row.token + row.count))
        places.extend(range(index * group.length, index * group.length + row.count))
    both = stage([*tokens, *places], torch.int64, device).view(2, -1)
    return GroupTensors(group, settings.batch_rows(len(group.rows)), both[0], both[1])


def _lay_out(parts: Sequence[torch.Tensor], counts: Sequence[int], num_blocks: int, size: int) -> torch.Tensor:
    """Parts (seq_len, Hk, D), each from a block's start, as (1, Hk, num_blocks * size, D); else zero."""
    flat = parts[0].new_zeros(num_blocks * size, *parts[0].shape[1:])
    start = 0
    for part, count in zip(parts, counts, strict=True):
        flat[start : start + len(part)] = part
        start += count * size
    return flat.transpose(0, 1).unsqueeze(0)
