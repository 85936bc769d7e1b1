"""Reading fields of a config.json, with errors that name the file and the field. Never imports transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import ModelConfigError

_SHARED = ("dtype", "torch_dtype")
"""Fields that a nested text_config may leave to the outer config."""


@dataclass(frozen=True, slots=True)
class ConfigFields:
    """The fields of one model's configuration and where they came from."""

    source: str
    """The file, or words for a dict."""
    values: Mapping[str, Any]
    folder: Path | None = None
    """Where the configuration was found, with weights beside it or not; ``None`` for a dict or a preset."""
    borrowed: Mapping[str, str] = field(default_factory=dict)
    """Where fields came from that ``source`` itself does not have."""

    def has(self, name: str) -> bool:
        """True if the field is there and not null."""
        return self.values.get(name) is not None

    def written(self, *names: str) -> str | None:
        """The first of ``names`` that is there and not null, as the file has it."""
        return next((name for name in names if self.has(name)), None)

    def first(self, *names: str) -> Any:
        """The value of the first of ``names`` that is there and not null, else ``None``."""
        name = self.written(*names)
        return None if name is None else self.values[name]

    def integer(self, *names: str, default: int | None = None, least: int = 1) -> int:
        """A whole number >= ``least`` under the first of ``names`` that is there.

        :raises ModelConfigError: if it is missing and has no default, or is something else.
        """
        name = self.written(*names)
        if name is None:
            if default is not None:
                return default
            raise self.missing(names)
        value = self.values[name]
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.broken(name, value, f"a whole number of at least {least}")
        return value

    def number(self, name: str) -> float | None:
        """A number, or ``None`` where the field is missing or null."""
        value = self.values.get(name)
        if isinstance(value, Mapping) and "__float__" in value:
            value = float(value["__float__"])
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise self.broken(name, value, "a number")
        return None if value is None else float(value)

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers.

        :raises ModelConfigError: if it is missing or something else.
        """
        value = self.values.get(name)
        if value is None:
            raise self.missing((name,))
        if not _is_list(value) or any(isinstance(part, bool) or not isinstance(part, int) for part in value):
            raise self.broken(name, value, "a list of whole numbers")
        return tuple(value)

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of words.

        :raises ModelConfigError: if it is missing or something else.
        """
        value = self.values.get(name)
        if value is None:
            raise self.missing((name,))
        if not _is_list(value) or any(not isinstance(part, str) for part in value):
            raise self.broken(name, value, "a list of words")
        return tuple(value)

    def part(self, name: str) -> ConfigFields:
        """The fields of a nested object; empty where it is missing.

        :raises ModelConfigError: if it is not an object.
        """
        value = self.values.get(name)
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            raise self.broken(name, value, "an object")
        return ConfigFields(f"{self.source}, in {name}", value)

    def missing(self, names: Sequence[str]) -> ModelConfigError:
        """The error for a field that is not there."""
        words = " or ".join(names)
        return ModelConfigError(f"{self.source} lacks the field {words}", option=names[0], value=None, expected=words)

    def broken(self, name: str, value: object, expected: str) -> ModelConfigError:
        """The error for a field with an unusable value."""
        shown = repr(value) if len(repr(value)) < 80 else repr(value)[:77] + "..."
        return ModelConfigError(
            f"{self.borrowed.get(name, self.source)}: field {name} is {shown}; expected {expected}",
            option=name,
            value=value,
            expected=expected,
        )


def load_config(model: str | Path | Mapping[str, Any], *, name: str | None = None) -> ConfigFields:
    """The text part of a configuration: a dict, a config.json, or a directory that has one.

    :param name: what error messages call a dict.
    :raises ModelConfigError: if the file is missing, is no JSON, or holds no object.
    """
    if isinstance(model, Mapping):
        return _text_part(ConfigFields(name or "the configuration dict", model))
    if not isinstance(model, (str, Path)) or not str(model).strip():
        raise ModelConfigError(
            f"model {model!r} is no preset name, no path and no dict",
            option="model",
            value=model,
            expected="a preset name, a directory with config.json, a config.json, or a dict with its content",
        )
    path = Path(model).expanduser()
    file = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        said = f"the folder {path.absolute()} has no config.json" if path.is_dir() else f"{file} does not exist"
        raise ModelConfigError(
            f"{said}; give a preset name, a checkpoint directory, a config.json or a dict",
            option="model",
            value=str(model),
            expected="a preset name, a directory with config.json, or a config.json",
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelConfigError(
            f"{file} cannot be read as JSON: {error}",
            option="model",
            value=str(model),
            expected="a JSON object",
        ) from error
    if not isinstance(values, Mapping):
        raise ModelConfigError(
            f"{file} holds a {type(values).__name__}; expected a JSON object",
            option="model",
            value=str(model),
            expected="a JSON object",
        )
    return _text_part(ConfigFields(str(file), values, file.parent))


def _text_part(fields: ConfigFields) -> ConfigFields:
    """The nested text_config with the outer dtype, or the fields themselves."""
    if not fields.has("text_config"):
        return fields
    inner = fields.part("text_config")
    shared = () if inner.written(*_SHARED) else _SHARED
    outer = {name: fields.values[name] for name in (*shared, "model_type") if fields.has(name) and not inner.has(name)}
    borrowed = MappingProxyType(dict.fromkeys(outer, fields.source))
    return ConfigFields(inner.source, {**inner.values, **outer}, fields.folder, borrowed)


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple))
