"""Steps of decodes as CUDA graphs, one per bucket of batch sizes: the host launches one graph instead of each kernel.

A graph holds the whole step: from each request's last token to its next one, with attention, state mixers and the
choice of the likeliest token inside. It reads the step's numbers from persistent tensors, which the host fills behind
the step before; requests that are missing to a bucket are rows that read and write nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .building import StepBuilder
from .capturing import Captured, capture
from .choosing import likeliest
from .context import PackedStep
from .decode_inputs import DecodeInputs
from .rows import Row

DecodeForward = Callable[[PackedStep, torch.Tensor, torch.Tensor], torch.Tensor]
"""One forward of a step of decodes: ids (B,) and positions (B,) to logits (B, V)."""


class DecodeGraphs:
    """Captures and replays.

    :param forward: run within the context of the step that it is given.
    :param inputs: the persistent tensors of ids, positions, seats and state slots.
    :param pool: memory for what graphs compute.
    """

    def __init__(
        self,
        builder: StepBuilder,
        inputs: DecodeInputs,
        forward: DecodeForward,
        buckets: Sequence[int],
        pool: Any = None,
    ) -> None:
        self._builder, self._inputs, self._forward, self._pool = builder, inputs, forward, pool
        self._buckets = tuple(buckets)
        self._captured: dict[int, Captured] = {}

    def bucket(self, count: int) -> int:
        """The smallest captured batch that holds ``count`` requests."""
        return self._buckets[bisect_left(self._buckets, count)]

    def capture(self) -> None:
        """Capture all buckets, largest first, so that the others share its memory."""
        for size in reversed(self._buckets):
            metadata = self._builder.captured_metadata(size)
            self._inputs.fill((), (), size)

            def run(size: int = size, metadata: Any = metadata) -> tuple[torch.Tensor, torch.Tensor]:
                return self._run(size, self._builder.captured(size, metadata, self._inputs.states(size)))

            self._captured[size] = capture(run, self._pool)

    def replay(self, rows: Sequence[Row], seats: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Queue the step of ``rows``; logits (B, V) and tokens (B,), overwritten by the next replay."""
        size = self.bucket(len(rows))
        captured = self._captured[size]
        self._builder.fill(rows, size)
        self._inputs.fill(rows, seats, size)
        captured.graph.replay()
        return captured.logits[: len(rows)], captured.tokens[: len(rows)]

    def _run(self, size: int, step: PackedStep) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self._forward(step, self._inputs.ids(size), self._inputs.positions(size))
        tokens = likeliest(logits)
        self._inputs.keep(tokens)
        return logits, tokens
