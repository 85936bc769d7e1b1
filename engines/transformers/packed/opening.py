"""From decisions to a running packed model."""

from __future__ import annotations

from typing import Any

from ..execution import Execution
from ..families import Traits
from ..records import Ready
from .runner import PackedRunner


def open_packed(model: Any, ready: Ready, traits: Traits, execution: Execution) -> PackedRunner:
    """The runner that ``execution`` asks for."""
    return PackedRunner(model, ready, traits, execution.kernels)
