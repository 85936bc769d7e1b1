"""Steps with prefill as CUDA graphs, one per bucket of tokens: what :mod:`.graphs` does for steps of decodes.

How the tokens are shared out among requests is read on the device, so that a graph serves one long prompt, many short
ones, and chunks beside decodes. Tokens that are missing to the bucket belong to a row without pages and states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .buckets import RaggedBucket
from .building import StepBuilder
from .capturing import Captured, capture
from .choosing import likeliest
from .context import PackedStep
from .ragged_inputs import RaggedInputs
from .rows import Row

RaggedForward = Callable[[PackedStep, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""One forward: ids (T,) and positions (T,) to logits (S, V) of tokens (S,)."""


class RaggedGraphs:
    """Captures and replays.

    :param forward: run within the context of the step that it is given.
    :param inputs: the persistent tensors of the step.
    :param buckets: ascending.
    :param pool: memory for what graphs compute.
    """

    def __init__(
        self,
        builder: StepBuilder,
        inputs: RaggedInputs,
        forward: RaggedForward,
        buckets: Sequence[RaggedBucket],
        pool: Any = None,
    ) -> None:
        self._builder, self._inputs, self._forward, self._pool = builder, inputs, forward, pool
        self._buckets = tuple(buckets)
        self._captured: dict[RaggedBucket, Captured] = {}
        self._logits: torch.Tensor | None = None

    def bucket(self, rows: Sequence[Row]) -> RaggedBucket | None:
        """The smallest bucket that holds ``rows``; None if none does."""
        return next((bucket for bucket in self._buckets if bucket.holds(rows)), None)

    def capture(self) -> None:
        """Capture all buckets, largest first, so that the others share its memory."""
        for bucket in reversed(self._buckets):
            metadata = self._builder.captured_ragged_metadata(bucket)
            self._inputs.fill((), (), bucket)

            def run(bucket: RaggedBucket = bucket, metadata: Any = metadata) -> tuple[torch.Tensor, torch.Tensor]:
                return self._run(bucket, self._builder.captured_ragged(bucket, metadata, self._inputs.states(bucket)))

            self._captured[bucket] = capture(run, self._pool)

    def replay(
        self, bucket: RaggedBucket, rows: Sequence[Row], seats: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queue the step of ``rows``; logits (S, V) and tokens (S,) of those that sample."""
        captured, sampled = self._captured[bucket], sum(row.samples for row in rows)
        self._builder.fill_ragged(rows, bucket)
        self._inputs.fill(rows, seats, bucket)
        captured.graph.replay()
        return captured.logits[:sampled], captured.tokens[:sampled]

    def _run(self, bucket: RaggedBucket, step: PackedStep) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = self._inputs
        logits = self._forward(step, inputs.ids(bucket), inputs.positions(bucket), inputs.ends(bucket))
        tokens = likeliest(logits)
        inputs.keep(tokens, bucket)
        return self._shared(logits), tokens

    def _shared(self, logits: torch.Tensor) -> torch.Tensor:
        """``logits`` where all graphs leave theirs: those of every graph by itself take gigabytes together."""
        if self._logits is None:  # made by the first run, before anything is captured
            self._logits = logits.new_empty(max(bucket.rows for bucket in self._buckets), logits.shape[1])
        return self._logits[: len(logits)].copy_(logits)
