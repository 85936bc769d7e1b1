"""Configurations of the kernels as a pure table: device facts and shapes in, numbers out. No torch, no Triton."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeConfig:
    """How decode is compiled and shared out."""

    tile: int
    """KV tokens of one step of a program."""
    warps: int
    stages: int
    swap: bool
    """Keys, not queries, are the rows of the matrix products."""
    programs: int
    """Programs for each compute unit."""
    rows: int = 16
    """Fewest rows (query tokens times query heads of a KV head) of a tile."""
    evict: bool = False
    """K and V are marked as the first to leave the cache."""
    fixed: int = 0
    """Tiles of a segment in the batch-invariant mode; 0 outside it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillConfig:
    """How prefill is compiled."""

    block_m: int
    """Rows of a tile."""
    block_n: int
    """KV tokens of one step of a program."""
    warps: int
    stages: int
    source: str
    """Where K and V are read: ``pages``, ``page tiles``, ``gathered`` or ``copies``."""
    specialised: bool = False
    """One warp group loads, two compute; ``warps`` is 4 then."""
    fixed: int = 0
    """KV tiles of a segment in the batch-invariant mode; 0 outside it."""
