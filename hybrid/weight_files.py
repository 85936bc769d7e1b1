"""How much memory a checkpoint's weights take, from the headers of its safetensors files. Loads no weight."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType

from ..cache.specs import dtype_bytes
from ..errors import ModelConfigError

INDEX = "model.safetensors.index.json"
HEADER_LIMIT = 100 * 2**20
"""Bytes; a longer header is not one."""
STORED_BYTES: Mapping[str, int] = MappingProxyType(
    {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
)
"""Bytes of an element by the format's dtype names; every other is one byte or less."""
CAST = ("F64", "F32", "F16", "BF16")
"""Dtypes that loading turns into the model's; quantised weights and indices stay as they are."""


def weights_bytes(folder: Path, dtype: str) -> int | None:
    """Bytes of the weights in ``folder`` once they are loaded as ``dtype``; ``None`` if there are none.

    :raises ModelConfigError: for a file that is no safetensors file.
    """
    files = _weight_files(folder)
    return sum(_loaded_bytes(file, dtype_bytes(dtype)) for file in files) if files else None


def _weight_files(folder: Path) -> list[Path]:
    """Those that the index names, so that a second copy in another format does not count; else all."""
    index = folder / INDEX
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise _broken(index, error, 'a JSON object with "weight_map"') from error
    missing = sorted(str(name) for name in names if not (folder / str(name)).is_file())
    if missing:
        said = f"{index} names {missing[0]}, which is not there"
        raise ModelConfigError(said, option=INDEX, value=missing[0], expected="all files that it names")
    return sorted(folder / str(name) for name in names)


def _loaded_bytes(file: Path, cast_bytes: int) -> int:
    """Of one file. The format: 8 bytes of little-endian header length, then JSON (safetensors' documentation)."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > HEADER_LIMIT:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(stream.read(length))
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        return sum(
            prod(tensor["shape"]) * (cast_bytes if tensor["dtype"] in CAST else STORED_BYTES.get(tensor["dtype"], 1))
            for tensor in tensors
        )
    except (OSError, ValueError, struct.error, KeyError, AttributeError, TypeError) as error:
        raise _broken(file, error, "a safetensors file") from error


def _broken(file: Path, error: Exception, expected: str) -> ModelConfigError:
    return ModelConfigError(
        f"{file} cannot be read as {expected}: {error}", option=file.name, value=str(file), expected=expected
    )
