"""From what startup made ready to a running engine: load the checkpoint, bind it to the cache."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ...errors import ModelConfigError
from ...platforms.ready import Ready
from .engine import TransformersEngine
from .loading import OnProgress, load_model


def open_engine(ready: Ready, on_progress: OnProgress | None = None) -> TransformersEngine:
    """The embedded engine for the checkpoint that ``ready`` was prepared for.

    :param on_progress: called with what is being loaded and the share that is done, 0 to 1.
    :raises ModelConfigError: if ``ready`` was not prepared from a checkpoint directory, or it is broken.
    """
    model = ready.config.model.model
    if isinstance(model, Mapping) or not Path(model).is_dir():
        shown = "a dict" if isinstance(model, Mapping) else repr(str(model))
        raise ModelConfigError(
            f"{shown} can be planned but not launched: launching needs a checkpoint directory with weights",
            option="model",
            value=shown,
            expected="a directory with config.json and *.safetensors",
        )
    place = ready.cache.buffer.device
    loaded, tokenizer = load_model(model, ready.plan.model.dtype, place, on_progress)
    return TransformersEngine(loaded, tokenizer, ready)


def silence() -> None:
    """Keep transformers' warnings off the terminal, for a command whose output is the generated text."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
