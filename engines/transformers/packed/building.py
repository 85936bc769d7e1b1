"""From rows to what operators look up: block tables, state slots and backends' metadata of one packed step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch

from ....attention_backends.metadata import StepMetadata
from ....attention_backends.persistent import StepBuffers
from ....cache.staging import stage
from ....hybrid.mixers.batch import StateBatch
from ..binding import Binding
from ..forward_step import prepare_backends
from .buckets import RaggedBucket
from .context import PackedStep
from .rows import Row


class StepBuilder:
    """Builds steps in persistent buffers, one set per attention group.

    :param max_rows: rows of the largest step, with those that pad it.
    :param max_num_batched_tokens: tokens of the largest step.
    :param max_model_len: tokens of the longest sequence.
    """

    def __init__(
        self,
        binding: Binding,
        *,
        max_rows: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        device: torch.device,
    ) -> None:
        self._binding, self._device, self._max_model_len = binding, device, max_model_len
        self.buffers: Mapping[int, StepBuffers] = {
            group.index: StepBuffers(
                max_num_seqs=max_rows,
                max_num_batched_tokens=max_num_batched_tokens,
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

    def dummy(self, lens: Sequence[int], seq_lens: Sequence[int], decode_only: bool = False) -> PackedStep:
        """A step of nobody's requests: kernels run as in any other, and no page is touched."""
        slots = [[-1] * len(lens) for _ in self.state_groups]
        return self._step(
            rows=tuple(lens),
            num_decodes=0,
            metadata={group: buffers.dummy(lens, seq_lens) for group, buffers in self.buffers.items()},
            states=self._batches(lens, [False] * len(lens), slots, decode_only),
        )

    def fill_ragged(self, rows: Sequence[Row], bucket: RaggedBucket) -> dict[int, StepMetadata]:
        """The same for a captured step with prefill."""
        starts, lens, places = [row.start for row in rows], [row.length for row in rows], bucket.places(rows)
        return {
            group: buffers.fill_ragged(
                [row.request.tables[group] for row in rows], starts, lens, places=places, rows=bucket.rows,
                tokens=bucket.tokens,
            )
            for group, buffers in self.buffers.items()
        }  # fmt: skip

    def captured_ragged_metadata(self, bucket: RaggedBucket) -> dict[int, StepMetadata]:
        """The metadata to capture a step with prefill with."""
        return {
            group: buffers.captured_ragged(bucket.rows, bucket.tokens, bucket.num_ragged, self._max_model_len)
            for group, buffers in self.buffers.items()
        }

    def captured_ragged(
        self, bucket: RaggedBucket, metadata: Mapping[int, StepMetadata], states: Mapping[int, StateBatch]
    ) -> PackedStep:
        """The step with prefill; backends prepare here, inside the graph."""
        lens = (*[0] * (bucket.rows - 1), bucket.tokens)
        return self._step(rows=lens, num_decodes=0, metadata=metadata, states=states)

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
        slots = [[row.request.tables[group].blocks[0] for row in rows] for group in self.state_groups]
        return self._batches(
            [row.length for row in rows], [row.start == 0 for row in rows], slots, all(row.is_decode for row in rows)
        )

    def _batches(
        self, lens: Sequence[int], fresh: Sequence[bool], slots: Sequence[Sequence[int]], decode_only: bool
    ) -> dict[int, StateBatch]:
        """Per state group the step as its mixers see it, from one copy; each tensor begins aligned."""
        if not slots:
            return {}
        parts = ([0, *accumulate(lens)], [int(flag) for flag in fresh], *slots)
        staged = stage([number for part in parts for number in _aligned(part)], torch.int32, self._device)
        starts = [0, *accumulate(len(_aligned(part)) for part in parts)]
        query_start, is_fresh, *pages = (
            staged[start : start + len(part)] for start, part in zip(starts, parts, strict=False)
        )
        return {
            group: StateBatch(
                query_start=query_start,
                slots=of_group,
                fresh=is_fresh.bool(),
                max_query_len=max(lens),
                query_lens_host=tuple(lens),
                decode_only=decode_only,
            )
            for group, of_group in zip(self.state_groups, pages, strict=True)
        }


def _aligned(numbers: Sequence[int]) -> list[int]:
    """Filled up to 16 bytes of int32: kernels are compiled for aligned addresses and for others."""
    return [*numbers, *[0] * (-len(numbers) % 4)]
