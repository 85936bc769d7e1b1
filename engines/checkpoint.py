"""Whether a model can be launched: a checkpoint directory with what loading needs. No torch, no loading."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ModelConfigError

EXPECTED = "a directory with config.json and *.safetensors"


def require_checkpoint(model: str | Path | Mapping[str, Any]) -> Path:
    """The directory of ``model``, ``~`` expanded, once it holds a configuration and weights.

    Asked before anything is allocated: a mistyped path costs no memory.

    :raises ModelConfigError: naming what is missing.
    """
    if isinstance(model, Mapping):
        raise _refuse("a dict", "a dict with a configuration can be planned but not launched")
    path = Path(model).expanduser()
    if not path.is_dir():
        raise _refuse(str(model), f"{str(model)!r} is not a directory here; a preset can be planned but not launched")
    if not (path / "config.json").is_file():
        raise _refuse(str(path), f"{path} has no config.json")
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise _refuse(str(path), f"{path} has no weights, no *.safetensors file")
    for file in weights:
        if not file.stat().st_size:
            raise _refuse(str(file), f"{file} is empty")
    return path


def _refuse(value: str, message: str) -> ModelConfigError:
    return ModelConfigError(f"{message}; give {EXPECTED}", option="model", value=value, expected=EXPECTED)
