"""Launching the kernels of attention over latents. Nothing here waits for the device."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ....device import DeviceFacts
from ...interface import AttentionCall
from ...metadata import StepMetadata
from .configs import LATENT_HEADS
from .items import tile_items
from .latent import latent_kernel, latent_sum_kernel
from .launch import LOG2E

ROWS = 64
"""Rows (query token, query head) of a program that takes several query tokens."""
TILE, SMALL_TILE = 32, 16
"""Latents of one step of a program: on Hopper, and where shared memory may be 99 KB."""
MOST_SPLITS = 32
_OPERANDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True, slots=True)
class LatentWork:
    """How a step is shared out."""

    splits: int
    """Programs that share the keys of a request with one query token; 0 if there is none."""
    items: torch.Tensor | None
    """(n, 2) int32: request, tile of query tokens, of requests with several."""
    tokens: int
    """Query tokens of a tile."""
    tile: int
    """Latents of one step of a program."""


def plan_latent(
    step: StepMetadata, heads: int, device: DeviceFacts, compute_units: int, *, invariant: bool
) -> LatentWork:
    """Programs for every request and tile; chosen from the host's numbers alone."""
    of_program = heads_of_program(heads)
    tokens = max(1, ROWS // of_program)
    capability = device.compute_capability
    tile = TILE if capability is not None and capability[0] == 9 else SMALL_TILE
    lens = step.query_lens_host
    longer = step.num_ragged > 0 or max(lens, default=0) > 1
    decodes = step.num_requests if step.num_ragged or 1 in lens else 0
    splits = 0
    if decodes:
        programs = decodes * -(-heads // of_program)
        needed = -(-max(step.seq_lens_host) // (4 * tile))
        splits = 1 if invariant else max(1, min(MOST_SPLITS, compute_units // programs, needed))
    return LatentWork(splits, tile_items(step, tokens, fewest=2) if longer else None, tokens, tile)


def heads_of_program(heads: int) -> int:
    """Query heads that a program takes: a power of two, enough for a matrix product."""
    return max(16, min(LATENT_HEADS, int(triton.next_power_of_2(heads))))


def attend_latents(
    query: torch.Tensor, latent: torch.Tensor, rope: torch.Tensor, step: StepMetadata, work: LatentWork,
    call: AttentionCall,
) -> torch.Tensor:  # fmt: skip
    """Shapes as in :meth:`AttentionImpl.forward_latent`."""
    (tokens, heads, _), rank, width = query.shape, latent.shape[-1], rope.shape[-1]
    out = query.new_empty(tokens, heads, rank)
    of_program, padded = heads_of_program(heads), max(16, int(triton.next_power_of_2(rank)))
    parts = -(-heads // of_program)
    shared: dict[str, Any] = {"HEADS": heads, "OF_PROGRAM": of_program, "R": rank, "RP": padded}
    options = {
        **shared, "P": width, "PP": max(16, int(triton.next_power_of_2(width))), "BLOCK_SIZE": latent.shape[1],
        "TILE": work.tile, "STAGES": 2, **_products(query.dtype), "num_warps": 8, "num_stages": 2,
    }  # fmt: skip
    pages = (latent, rope, step.block_table, step.seq_lens, step.query_start)
    numbers = (call.scale * LOG2E, work.splits, *query.stride()[:2], *latent.stride()[:2], *rope.stride()[:2],
               step.block_table.stride(0))  # fmt: skip
    if work.items is not None:
        latent_kernel[(len(work.items) * parts, 1)](
            out, None, None, query, *pages, work.items, *numbers, TOKENS=work.tokens, ITEMS=True, SPLIT=False, **options
        )
    if not work.splits:
        return out
    part = sums = None
    if work.splits > 1:
        rows = work.splits * step.num_requests * heads
        part = torch.empty(rows * padded, dtype=torch.float32, device=query.device)
        sums = torch.empty(rows * 2, dtype=torch.float32, device=query.device)
    latent_kernel[(step.num_requests * parts, work.splits)](
        out, part, sums, query, *pages, None, *numbers, TOKENS=1, ITEMS=False, SPLIT=work.splits > 1, **options
    )
    if part is not None:
        few = 4
        latent_sum_kernel[(step.num_requests, -(-heads // few))](
            out, part, sums, step.query_start, work.splits, **{**shared, "OF_PROGRAM": few}, num_warps=4
        )
    return out


def _products(dtype: torch.dtype) -> dict[str, Any]:
    """Numbers of ``dtype`` as they are; Triton's interpreter cannot multiply bfloat16."""
    if dtype == torch.float32 or os.environ.get("TRITON_INTERPRET") == "1":
        return {"OPERAND": tl.float32, "PRECISION": "ieee"}
    return {"OPERAND": _OPERANDS[dtype], "PRECISION": "tf32"}
