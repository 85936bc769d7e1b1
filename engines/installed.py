"""Whether the software that running a model needs is here; planning needs none of it. No torch."""

from __future__ import annotations

from importlib.util import find_spec

from ..errors import ConfigError


def require_torch() -> None:
    """What every backend and the cache are made of.

    :raises ConfigError: saying how to get it.
    """
    _require("torch")


def require_transformers() -> None:
    """What the embedded engine loads models with; asked before a cache is allocated, once torch is there.

    :raises ConfigError: naming what is missing, and how to get it.
    """
    if find_spec("torch") is not None:
        _require("transformers", "safetensors")


def _require(*modules: str) -> None:
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"running a model needs {' and '.join(missing)}, which this Python does not have: "
            "pip install 'makeready[engine]'",
            option="model",
            value=missing,
            expected="pip install 'makeready[engine]'",
        )
