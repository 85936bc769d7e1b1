"""The face: ``plan`` decides without the device, ``prepare`` makes an engine ready on it, ``launch`` runs a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .attention_backends.interface import AttentionBackend, BuildRequest, LayerRequest, Probe
from .attention_backends.selection import Selection, select_layers
from .config import EngineConfig
from .device import DeviceFacts
from .errors import ConfigError
from .hybrid.model_specs import ModelSpec, read_model
from .platforms.interface import Platform
from .platforms.planning import Plan, plan_model
from .plugins.manager import Plugins, load_plugins

if TYPE_CHECKING:
    from .engines.transformers.records import Output
    from .platforms.ready import Ready

BUNDLED_MODEL = Path(__file__).parent / "engines" / "transformers" / "tiny_hybrid"
"""Checkpoint directory of the small hybrid model that comes with the package."""
