"""What attention kernels take beside the cache, in plain numbers, so that a memory budget can count it. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLimits:
    """How large a step gets."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    """Longest sequence, in tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """What the layers of one kind take on top of queries, outputs and the cache, in bytes."""

    kept_bytes: int = 0
    """Held from layer to layer, or from step to step; all layers of the kind share it."""
    layer_bytes: int = 0
    """Held while one layer runs, and free again for the next."""


def total_bytes(kinds: Iterable[Workspace]) -> int:
    """What a step of a model holds at most, which has one workspace for each kind of layer."""
    found = tuple(kinds)
    return sum(one.kept_bytes for one in found) + max((one.layer_bytes for one in found), default=0)
