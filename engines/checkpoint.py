"""A checkpoint directory as plain facts: where its files are and how many parameters it holds. No torch."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

from ..cache.specs import DTYPE_BYTES
from ..errors import ModelConfigError

_HEADER_LIMIT = 100 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A directory that transformers can load."""

    directory: Path
    weight_files: tuple[Path, ...]
    num_parameters: int
    """Elements of all tensors in the weight files."""

    def weight_bytes(self, dtype: str) -> int:
        """Bytes of the weights once they are loaded as ``dtype``."""
        return self.num_parameters * DTYPE_BYTES[dtype]


def read_checkpoint(directory: str | Path) -> Checkpoint:
    """The facts of a checkpoint directory, from its safetensors headers.

    :raises ModelConfigError: when the directory, config.json or the weights are missing or broken.
    """
    path = Path(directory)
    if not path.is_dir():
        raise ModelConfigError(
            f"checkpoint {str(path)!r} is not a directory; give one with config.json and *.safetensors files",
            option="model",
            value=str(path),
            expected="a directory with config.json and *.safetensors",
        )
    if not (path / "config.json").is_file():
        raise ModelConfigError(
            f"{path / 'config.json'} is missing; a checkpoint directory needs it beside its weights",
            option="config.json",
            value=str(path),
            expected="a config.json file",
        )
    files = tuple(sorted(path.glob("*.safetensors")))
    if not files:
        raise ModelConfigError(
            f"{path} holds no *.safetensors file; makeready loads safetensors weights only",
            option="model",
            value=str(path),
            expected="*.safetensors files",
        )
    return Checkpoint(directory=path, weight_files=files, num_parameters=sum(map(_count_parameters, files)))


def _count_parameters(file: Path) -> int:
    """Elements in one safetensors file (format: 8-byte little-endian header length, then JSON)."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _HEADER_LIMIT:
                raise ValueError(f"header of {length} bytes")
            header = json.loads(stream.read(length))
        return sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    except (OSError, ValueError, struct.error, KeyError, TypeError) as error:
        raise ModelConfigError(
            f"{file} is not a readable safetensors file: {error}",
            option=file.name,
            value=str(file),
            expected="a safetensors file",
        ) from error
