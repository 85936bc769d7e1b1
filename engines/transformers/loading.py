"""A checkpoint directory becomes a model and a tokenizer, with named errors and without transformers' chatter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...errors import ModelConfigError
from ..checkpoint import require_checkpoint
from .families import check_version

OnProgress = Callable[[str, float], None]
"""Called with what is being done and the share that is done, 0 to 1."""

TOKENIZERS: tuple[str, ...] = (
    "tokenizer.json", "*.model", "*vocab*", "*.tiktoken", "tekken.json", "*.bpe", "byte_maps.json", "*.tokenizer",
)  # fmt: skip
"""Files of which any tokenizer needs one; some classes load without, and know no word."""


def load_model(
    directory: str | Path,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    on_progress: OnProgress | None = None,
) -> tuple[Any, Any]:
    """The model in evaluation mode, and its tokenizer.

    :param directory: holds config.json, weights in safetensors files, and the tokenizer's files.
    :param dtype: of weights and activations; ``auto`` takes the checkpoint's.
    :return: model and tokenizer, as transformers makes them.
    :raises ModelConfigError: for what is missing or broken, naming the file.
    """
    import transformers

    check_version(transformers.__version__)
    path = require_checkpoint(directory)
    report = on_progress or (lambda what, share: None)
    with _quiet():
        report("tokenizer", 0.0)
        _require_tokenizer(path)
        tokenizer = _guarded(path, "tokenizer", transformers.AutoTokenizer.from_pretrained, path)
        report("weights", 0.1)
        model, info = _guarded(
            path, "weights", transformers.AutoModelForCausalLM.from_pretrained, path,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype), output_loading_info=True,
            ignore_mismatched_sizes=True,  # what differs is refused below, with both shapes
        )  # fmt: skip
    _check_complete(path, info)
    report("device", 0.8)
    model = model.to(device).eval()
    report("ready", 1.0)
    return model, tokenizer


def _guarded(path: Path, what: str, load: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``load(...)`` from local files only; whatever it raises names the checkpoint."""
    try:
        return load(*args, local_files_only=True, **kwargs)
    except Exception as error:  # transformers and safetensors raise many types; all mean a broken checkpoint
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise _refuse(path, f"the {what} in {path} cannot be loaded: {reason}", f"readable {what}") from error


def _require_tokenizer(path: Path) -> None:
    if not any(any(path.glob(pattern)) for pattern in TOKENIZERS):
        said = f"no tokenizer.json in {path}, nor another tokenizer's file; copy it there from where the weights came"
        raise _refuse(path, said, "tokenizer.json")


def _check_complete(path: Path, info: dict[str, Any]) -> None:
    other = [f"{name} {list(has)}, not {list(wanted)}" for name, has, wanted in sorted(info.get("mismatched_keys", ()))]
    if other:
        said = f"the weights in {path} have other shapes than its config.json says: {_first(other, '; ')}"
        raise _refuse(path, f"{said}; use the config.json that these weights came with", "weights of these shapes")
    lacking = sorted(map(str, info.get("missing_keys", ())))
    if lacking:
        said = f"the weights in {path} lack {_first(lacking, ', ')}"
        raise _refuse(path, f"{said}; copy every file of the checkpoint, and its own config.json", "all weights")


def _first(found: Sequence[str], between: str) -> str:
    """The first three, and how many more there are."""
    return between.join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def _refuse(path: Path, message: str, expected: str) -> ModelConfigError:
    return ModelConfigError(message, option="model", value=str(path), expected=expected)


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no warnings of transformers while active; both are as they were after."""
    from transformers.utils import logging as chatter

    logging: Any = chatter
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
