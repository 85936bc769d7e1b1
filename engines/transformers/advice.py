"""Advice of transformers that does not hold where the engine runs a model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

_SPEAKER = "transformers.integrations.hub_kernels"


def _holds(record: logging.LogRecord) -> bool:
    return "is falling back to its reference PyTorch implementation" not in record.getMessage()


@contextmanager
def without_kernel_advice(*, holds: bool) -> Iterator[None]:
    """Nobody is told to install kernels that would not run: it would land amid the text that streams.

    :param holds: whether the advice does: on CUDA, for a model that runs its own mixers. Nothing is kept back then.
    """
    if holds:
        yield
        return
    speaker = logging.getLogger(_SPEAKER)
    speaker.addFilter(_holds)
    try:
        yield
    finally:
        speaker.removeFilter(_holds)
