"""Tiles of query tokens as (request, tile), the longest first: made on the host, or on the device when captured."""

from __future__ import annotations

import torch

from ....cache.staging import stage
from ...metadata import StepMetadata

NO_TILE = 1 << 20
"""A tile past every request's tokens."""


def tile_items(step: StepMetadata, tokens: int, *, fewest: int) -> torch.Tensor:
    """(n, 2) int32: tiles of ``tokens`` query tokens of every request that has ``fewest`` or more."""
    if step.num_ragged:
        return _on_device(step, tokens, fewest)
    found = [
        (length - queries + tile * tokens, request, tile)
        for request, (length, queries) in enumerate(zip(step.seq_lens_host, step.query_lens_host, strict=True))
        if queries >= fewest
        for tile in range(-(-queries // tokens))
    ]
    found.sort(reverse=True)
    numbers = [number for _, request, tile in found for number in (request, tile)]
    return stage(numbers, torch.int32, step.seq_lens.device).view(-1, 2)


def _on_device(step: StepMetadata, tokens: int, fewest: int) -> torch.Tensor:
    """As many tiles as T tokens and ``num_ragged`` requests may need; what is not needed lies past a request's tokens.

    Requests without keys, which only fill the step up, have tiles: their rows are written.
    """
    count = step.num_tokens // tokens + min(step.num_ragged, step.num_tokens // fewest)
    lens = step.query_start.diff()
    ends = torch.where(lens >= fewest, (lens + tokens - 1) // tokens, 0).cumsum(0, dtype=torch.int32)
    place = ends[-1] - 1 - torch.arange(count, dtype=torch.int32, device=lens.device)  # a request's last tile first
    request = torch.searchsorted(ends, place, right=True).clamp_max(step.num_requests - 1)
    first = torch.where(request > 0, ends[request - 1], 0)
    tile = torch.where(place >= 0, place - first, NO_TILE)
    return torch.stack([request.to(torch.int32), tile.to(torch.int32)], dim=1)
