"""Which chunk of which request a program takes."""

from __future__ import annotations

import torch

from ..batch import StateBatch


def chunk_table(batch: StateBatch, size: int, num_tokens: int) -> torch.Tensor:
    """(M, 2) int32: request and number of every chunk of ``size`` tokens of the requests with several tokens.

    Rows past the last chunk name request B. Made on the device without waiting for it; M is exact where the host
    knows the lengths, and a bound elsewhere.
    """
    return batch.tables.get(("chunks", size), lambda: (_make(batch, size, num_tokens),))[0]


def _make(batch: StateBatch, size: int, num_tokens: int) -> torch.Tensor:
    device = batch.query_start.device
    if batch.query_lens_host is not None:
        rows = [
            (request, number)
            for request, length in enumerate(batch.query_lens_host)
            if length > 1
            for number in range(-(-length // size))
        ]
        return torch.tensor(rows, dtype=torch.int32).reshape(-1, 2).to(device, non_blocking=True)
    bound = num_tokens // size + min(batch.num_requests, num_tokens)
    lens = batch.query_start.diff()
    ends = torch.where(lens > 1, (lens + size - 1) // size, 0).cumsum(0)
    numbers = torch.arange(bound, device=device)
    request = torch.searchsorted(ends, numbers, right=True)
    first = torch.cat([ends.new_zeros(1), ends])[request]
    return torch.stack([request, numbers - first], dim=1).to(torch.int32)
