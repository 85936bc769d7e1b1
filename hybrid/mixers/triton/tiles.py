"""Sizes of programs. Chosen from shapes and dtypes alone, so that a captured graph sees the same every time.

Where a number was measured, benchmarks/LOG.md has the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from ..environment import interpreted

_OPERANDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True, slots=True)
class Tile:
    """One program: rows of the state that it owns, tokens that it takes at once, and how it is compiled."""

    rows: int
    tokens: int = 1
    warps: int = 4
    stages: int = 1
    registers: int | None = None
    """Most registers that a thread may have on CUDA, so that more programs run beside each other."""

    def options(self, device: torch.device) -> dict[str, int]:
        """How a launch on ``device`` says it."""
        limit = {"maxnreg": self.registers} if self.registers is not None and device.type == "cuda" else {}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


def power_of_two(size: int, least: int = 1) -> int:
    """The smallest power of two that holds ``size`` and ``least``."""
    return max(least, 1 << max(size - 1, 0).bit_length())


def products(dtype: torch.dtype) -> dict[str, Any]:
    """How tokens of ``dtype`` are multiplied: as they are, float32 without rounding to tf32.

    Triton's interpreter cannot multiply bfloat16, so there products are float32.
    """
    if dtype == torch.float32 or interpreted():
        return {"OPERAND": tl.float32, "PRECISION": "ieee"}
    return {"OPERAND": _OPERANDS[dtype], "PRECISION": "tf32"}


def inversion(dtype: torch.dtype) -> str:
    """Precision of the float32 products that invert a chunk's matrix, which is then rounded to ``dtype``."""
    return "ieee" if dtype == torch.float32 else "tf32"


def step_tile(width: int, size: int, element_bytes: int, warps: int = 4) -> Tile:
    """A decode moves its state once: enough bytes a program to hide the latency, few enough registers for several."""
    rows = 16384 // (power_of_two(size) * element_bytes)
    return Tile(rows=max(1, min(rows, power_of_two(width))), warps=warps)


def delta_tile(width: int, dtype: torch.dtype) -> Tile:
    """A gated delta rule's walk over the states."""
    rows = power_of_two(width, 16)
    if dtype == torch.float32:
        return Tile(rows=min(32, rows), tokens=16, warps=4)
    return Tile(rows=64, tokens=64, warps=4, stages=2)
