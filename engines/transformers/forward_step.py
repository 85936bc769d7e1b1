"""One forward pass as the cache and the attention function see it: which requests, which tokens, which blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...attention_backends.metadata import StepMetadata
from ...cache.block_table import pad_tables, slot_mapping
from ...cache.staging import stage
from .binding import Binding
from .requests import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardStep:
    """B requests with the same number of query tokens each."""

    starts: tuple[int, ...]
    """Tokens of each request that were in the cache before."""
    query_len: int
    """Query tokens of every request."""
    state_blocks: Mapping[int, tuple[int, ...]]
    """Per state group the block of each request."""
    state_index: Mapping[int, torch.Tensor]
    """The same as (B,) int64."""
    metadata: Mapping[int, StepMetadata]
    """Per attention group."""
    prepared: Mapping[int, Any]
    """Per attention layer, what its backend made of the group's metadata."""

    @property
    def num_requests(self) -> int:
        """B."""
        return len(self.starts)

    @property
    def is_fresh(self) -> bool:
        """True for the first tokens of a request: nothing of it is in the cache."""
        return self.starts[0] == 0


def build_step(binding: Binding, requests: Sequence[Request], query_len: int, device: torch.device) -> ForwardStep:
    """The step in which each of ``requests`` computes its next ``query_len`` tokens."""
    starts = tuple(request.num_computed for request in requests)
    state_blocks = {
        group.index: tuple(request.tables[group.index].blocks[0] for request in requests)
        for group in binding.groups
        if group.is_state
    }
    metadata = {
        group.index: _metadata(binding, group.index, requests, starts, query_len, device)
        for group in binding.groups
        if not group.is_state
    }
    return ForwardStep(
        starts=starts,
        query_len=query_len,
        state_blocks=state_blocks,
        state_index={group: stage(ids, torch.int64, device) for group, ids in state_blocks.items()},
        metadata=metadata,
        prepared=prepare_backends(binding, metadata),
    )


def _metadata(
    binding: Binding,
    group: int,
    requests: Sequence[Request],
    starts: tuple[int, ...],
    query_len: int,
    device: torch.device,
) -> StepMetadata:
    tables = [request.tables[group].blocks for request in requests]
    lens = [query_len] * len(requests)
    seq_lens = tuple(start + query_len for start in starts)
    return StepMetadata(
        query_start=stage([query_len * index for index in range(len(requests) + 1)], torch.int32, device),
        seq_lens=stage(seq_lens, torch.int32, device),
        block_table=pad_tables(tables, device),
        slot_mapping=slot_mapping([request.tables[group] for request in requests], starts, lens, device),
        query_lens_host=tuple(lens),
        seq_lens_host=seq_lens,
        block_size=binding.block_size,
    )


def prepare_backends(binding: Binding, metadata: Mapping[int, StepMetadata]) -> dict[int, Any]:
    """Each backend prepares once per group, however many layers share it."""
    shared: dict[tuple[int, int], Any] = {}
    prepared: dict[int, Any] = {}
    for index, layer in binding.attention.items():
        key = (layer.group, id(layer.impl))
        if key not in shared:
            shared[key] = layer.impl.prepare(metadata[layer.group])
        prepared[index] = shared[key]
    return prepared
