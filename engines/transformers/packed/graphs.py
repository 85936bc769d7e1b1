"""Steps of decodes as CUDA graphs, one per bucket of batch sizes: the host launches one graph instead of each kernel.

A graph holds the whole step: from each request's last token to its next one, with attention, state mixers and the
choice of the likeliest token inside. It reads the step's numbers from persistent tensors, which the host fills behind
the step before; requests that are missing to a bucket are rows that read and write nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .building import StepBuilder
from .choosing import likeliest
from .context import PackedStep
from .decode_inputs import DecodeInputs
from .rows import Row

DecodeForward = Callable[[PackedStep, torch.Tensor, torch.Tensor], torch.Tensor]
"""One forward of a step of decodes: ids (B,) and positions (B,) to logits (B, V)."""

WARM_UPS = 2
"""Runs before a capture: the first compiles kernels, the second is free of what only a first run does."""


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor
    tokens: torch.Tensor


def buckets_up_to(max_num_seqs: int) -> tuple[int, ...]:
    """Batch sizes with a graph of their own: close together where a padding row costs much, far apart above."""
    sizes = [1, 2, 4, 8, *range(16, 64, 8), *range(64, 128, 16), *range(128, 256, 32), *range(256, max_num_seqs, 64)]
    return (*(size for size in sizes if size < max_num_seqs), max_num_seqs)


class DecodeGraphs:
    """Captures and replays.

    :param forward: run within the context of the step that it is given.
    :param inputs: the persistent tensors of ids, positions, seats and state slots.
    """

    def __init__(
        self, builder: StepBuilder, inputs: DecodeInputs, forward: DecodeForward, buckets: Sequence[int]
    ) -> None:
        self._builder, self._inputs, self._forward = builder, inputs, forward
        self._buckets = tuple(buckets)
        self._captured: dict[int, _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def bucket(self, count: int) -> int:
        """The smallest captured batch that holds ``count`` requests."""
        return self._buckets[bisect_left(self._buckets, count)]

    def capture(self) -> None:
        """Capture all buckets, largest first, so that the others share its memory."""
        for size in reversed(self._buckets):
            self._captured[size] = self._capture(size)

    def replay(self, rows: Sequence[Row], seats: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Queue the step of ``rows``; logits (B, V) and tokens (B,), overwritten by the next replay."""
        size = self.bucket(len(rows))
        captured = self._captured[size]
        self._builder.fill(rows, size)
        self._inputs.fill(rows, seats, size)
        captured.graph.replay()
        return captured.logits[: len(rows)], captured.tokens[: len(rows)]

    def _capture(self, size: int) -> _Captured:
        """All rows are padding while a graph is warmed up and captured, so that no request is touched."""
        metadata = self._builder.captured_metadata(size)
        self._inputs.fill((), (), size)
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._run(size, self._builder.captured(size, metadata, self._inputs.states(size)))
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits, tokens = self._run(size, self._builder.captured(size, metadata, self._inputs.states(size)))
        return _Captured(graph, logits, tokens)

    def _run(self, size: int, step: PackedStep) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self._forward(step, self._inputs.ids(size), self._inputs.positions(size))
        tokens = likeliest(logits)
        self._inputs.keep(tokens)
        return logits, tokens
