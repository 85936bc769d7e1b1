"""The likeliest token of each row of logits, on the device."""

from __future__ import annotations

import torch

_PARTS = (256, 128, 64, 32)
"""A row is searched in this many parts at once: one part a row leaves most of the device idle."""


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """The first of the largest logits of each row: (B, V) to (B,) int64."""
    vocabulary = logits.shape[-1]
    parts = next((parts for parts in _PARTS if vocabulary % parts == 0), 1)
    if parts == 1 or logits.device.type == "cpu":
        return logits.argmax(dim=-1)
    values, places = logits.view(-1, parts, vocabulary // parts).max(dim=-1)
    part = values.argmax(dim=-1, keepdim=True)
    return (part * (vocabulary // parts) + places.gather(-1, part)).squeeze(-1)
