"""Which chunk of which request a program takes."""

from __future__ import annotations

from itertools import accumulate, chain

import torch

from ..batch import StateBatch


def chunk_table(batch: StateBatch, size: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(M, 2) int32 request and number of every chunk, and (B + 1,) int32 the first chunk of every request.

    Only requests with several tokens have chunks. Rows past the last chunk name request B. Made on the device without
    waiting for it; M is exact where the host knows the lengths, and a bound elsewhere.
    """
    table, firsts = batch.tables.get(("chunks", size), lambda: _make(batch, size, num_tokens))
    return table, firsts


def _make(batch: StateBatch, size: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    device = batch.query_start.device
    if batch.query_lens_host is not None:
        counts = [-(-length // size) if length > 1 else 0 for length in batch.query_lens_host]
        rows = [(request, number) for request, count in enumerate(counts) for number in range(count)]
        firsts = list(accumulate(counts, initial=0))
        both = torch.tensor([*chain.from_iterable(rows), *firsts], dtype=torch.int32)
        if device.type == "cuda":
            both = both.pin_memory()
        both = both.to(device, non_blocking=True)
        return both[: 2 * len(rows)].view(-1, 2), both[2 * len(rows) :]
    bound = num_tokens // size + min(batch.num_requests, num_tokens)
    lens = batch.query_start.diff()
    ends = torch.where(lens > 1, (lens + size - 1) // size, 0).cumsum(0)
    numbers = torch.arange(bound, device=device)
    request = torch.searchsorted(ends, numbers, right=True)
    first = torch.cat([ends.new_zeros(1), ends])
    return torch.stack([request, numbers - first[request]], dim=1).to(torch.int32), first.to(torch.int32)
