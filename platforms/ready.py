"""What the engine startup hook hands to an engine: every decision, and the objects that carry them out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..cache.specs import LayerGroup
from ..config import EngineConfig
from ..device import DeviceFacts
from ..hybrid.model_specs import ModelSpec
from .planning import Plan

if TYPE_CHECKING:
    from ..attention_backends.interface import AttentionImpl
    from ..cache.allocation import KVCache


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """Frozen: an engine reads it, and owns the cache's content."""

    config: EngineConfig
    model: ModelSpec
    device: DeviceFacts
    plan: Plan
    cache: KVCache
    """The allocated pool of pages, with one view per layer."""
    attention: Mapping[int, AttentionImpl]
    """Per attention layer (the model's layer index), the built backend; layers alike share one."""

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        """Groups of layers, each with a block table of its own."""
        return self.plan.groups

    @property
    def block_size(self) -> int:
        """Tokens of a block of an attention group."""
        return self.plan.block_size

    def explain(self) -> str:
        """Platform, backend per layer, block size, pages, capacity, each with its reason."""
        return self.plan.explain()
