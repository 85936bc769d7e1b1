"""From rows to what operators look up: block tables, state slots and backends' metadata of one packed step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ....attention_backends.metadata import StepMetadata
from ....attention_backends.persistent import StepBuffers
from ....cache.staging import stage
from ....hybrid.mixers.batch import StateBatch
from ..binding import Binding
from ..forward_step import prepare_backends
from .context import PackedStep
from .rows import Row


class StepBuilder:
    """Builds steps in persistent buffers, one set per attention group.

    :param max_num_seqs: rows of the largest step.
    :param max_num_batched_tokens: tokens of the largest step.
    :param max_model_len: tokens of the longest sequence.
    """

    def __init__(
        self,
        binding: Binding,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        device: torch.device,
    ) -> None:
        self._binding, self._device, self._max_model_len = binding, device, max_model_len
        self.buffers: Mapping[int, StepBuffers] = {
            group.index: StepBuffers(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max(max_num_batched_tokens, max_num_seqs),
                max_blocks=-(-max_model_len // group.block_size),
                block_size=group.block_size,
                device=device,
            )
            for group in binding.groups
            if not group.is_state
        }

    @property
    def state_groups(self) -> tuple[int, ...]:
        """Indices of the groups whose layers keep a state."""
        return tuple(group.index for group in self._binding.groups if group.is_state)

    def build(self, rows: Sequence[Row]) -> PackedStep:
        """The step of ``rows``."""
        return self._step(
            rows=tuple(row.length for row in rows),
            num_decodes=sum(row.is_decode for row in rows),
            metadata=self.fill(rows),
            states=self._states(rows),
        )

    def fill(self, rows: Sequence[Row], bucket: int | None = None) -> dict[int, StepMetadata]:
        """Block tables and slots of ``rows`` in the buffers; rows past them pad the step to ``bucket``."""
        starts, lens = [row.start for row in rows], [row.length for row in rows]
        return {
            group: buffers.fill([row.request.tables[group] for row in rows], starts, lens, rows=bucket)
            for group, buffers in self.buffers.items()
        }

    def captured_metadata(self, bucket: int) -> dict[int, StepMetadata]:
        """The metadata to capture a step of ``bucket`` decodes with."""
        return {group: buffers.captured(bucket, self._max_model_len) for group, buffers in self.buffers.items()}

    def captured(
        self, bucket: int, metadata: Mapping[int, StepMetadata], states: Mapping[int, StateBatch]
    ) -> PackedStep:
        """The step of ``bucket`` decodes; backends prepare here, inside the graph."""
        return self._step(rows=(1,) * bucket, num_decodes=bucket, metadata=metadata, states=states)

    def _step(
        self,
        *,
        rows: tuple[int, ...],
        num_decodes: int,
        metadata: Mapping[int, StepMetadata],
        states: Mapping[int, StateBatch],
    ) -> PackedStep:
        prepared: Mapping[int, Any] = prepare_backends(self._binding, metadata)
        return PackedStep(query_lens=rows, num_decodes=num_decodes, metadata=metadata, prepared=prepared, states=states)

    def _states(self, rows: Sequence[Row]) -> dict[int, StateBatch]:
        groups = self.state_groups
        if not groups:
            return {}
        lens = tuple(row.length for row in rows)
        starts = [0]
        for length in lens:
            starts.append(starts[-1] + length)
        fresh = [int(row.start == 0) for row in rows]
        slots = [row.request.tables[group].blocks[0] for group in groups for row in rows]
        staged = stage([*starts, *fresh, *slots], torch.int32, self._device)
        query_start, is_fresh, packed = torch.split(staged, [len(starts), len(fresh), len(slots)])
        return {
            group: StateBatch(
                query_start=query_start,
                slots=packed[index * len(rows) : (index + 1) * len(rows)],
                fresh=is_fresh.bool(),
                max_query_len=max(lens),
                query_lens_host=lens,
                decode_only=all(row.is_decode for row in rows),
            )
            for index, group in enumerate(groups)
        }
