"""From what startup made ready to a running engine: load the checkpoint, bind it to the cache."""

from __future__ import annotations

from ...platforms.ready import Ready
from ..checkpoint import require_checkpoint
from .engine import TransformersEngine
from .loading import OnProgress, load_model


def open_engine(ready: Ready, on_progress: OnProgress | None = None) -> TransformersEngine:
    """The embedded engine for the checkpoint that ``ready`` was prepared for.

    :param on_progress: called with what is being loaded and the share that is done, 0 to 1.
    :raises ModelConfigError: if ``ready`` was not prepared from a checkpoint directory, or it is broken.
    """
    model = require_checkpoint(ready.config.model.model)
    place = ready.cache.buffer.device
    loaded, tokenizer = load_model(model, ready.plan.model.dtype, place, on_progress)
    return TransformersEngine(loaded, tokenizer, ready)


def silence() -> None:
    """Keep transformers' warnings off the terminal, for a command whose output is the generated text."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
