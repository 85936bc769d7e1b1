"""Intel GPUs."""

from __future__ import annotations

from ..cache.block_size import MultipleOf
from .interface import Platform, StateConstraint

XPU = Platform(
    name="xpu",
    device_type="xpu",
    state_constraints=(
        StateConstraint(kinds=frozenset({"gdn", "kda"}), constraint=MultipleOf(64, owner="gated delta net on xpu")),
    ),
)
"""Gated-delta-net kernels work on 64 tokens at a time, and Kimi's delta attention runs on the same kernels."""
