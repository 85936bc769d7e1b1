"""One CUDA graph of a step, from its tokens to the next ones."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Run = Callable[[], tuple[torch.Tensor, torch.Tensor]]
"""A step on persistent tensors: logits (S, V) and tokens (S,)."""


@dataclass(frozen=True, slots=True)
class Captured:
    """A graph, and what every replay of it overwrites."""

    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor
    tokens: torch.Tensor


def capture(run: Run, pool: Any) -> Captured:
    """Run ``run``, which compiles and loads what a capture may not, and then record it.

    All of its rows must be padding, so that no request is touched.

    :param pool: memory of graphs that are never replayed at the same time.
    """
    run()  # on this stream: on a new one, cuBLAS would take another 32 MiB to work in
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the device meanwhile; only this one is recorded.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        logits, tokens = run()
    return Captured(graph, logits, tokens)


@contextmanager
def nothing_collected() -> Iterator[None]:
    """No garbage is collected meanwhile: memory or a graph that is freed while another is recorded spoils that."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
