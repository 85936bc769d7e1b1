"""Which chunk of which request a program takes."""

from __future__ import annotations

import torch

from ..batch import StateBatch


def chunk_table(batch: StateBatch, size: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every chunk of ``size`` tokens, and (B + 1,) int32 the first chunk of every request.

    A chunk is a row of (M, 4) int32: its request, its number there, its first token, and the request's tokens from
    there on. Only requests with several tokens have chunks. M is exact where the host knows the lengths, and a bound
    elsewhere, where rows past the last chunk have no tokens; nothing waits for the device.
    """
    table, firsts = batch.tables.get(("chunks", size), lambda: _make(batch, size, num_tokens))
    return table, firsts


def _make(batch: StateBatch, size: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    if batch.query_lens_host is None:
        return _on_device(batch, size, num_tokens)
    rows: list[int] = []
    firsts, start = [0], 0
    for request, length in enumerate(batch.query_lens_host):
        offsets = range(0, length if length > 1 else 0, size)
        for number, offset in enumerate(offsets):
            rows += (request, number, start + offset, length - offset)
        firsts.append(firsts[-1] + len(offsets))
        start += length
    staged = torch.tensor([*rows, *firsts], dtype=torch.int32)
    device = batch.query_start.device
    if device.type == "cuda":
        staged = staged.pin_memory()
    staged = staged.to(device, non_blocking=True)
    return staged[: len(rows)].view(-1, 4), staged[len(rows) :]


def _on_device(batch: StateBatch, size: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    bound = num_tokens // size + min(batch.num_requests - batch.first_ragged, num_tokens // 2)
    lens = batch.query_start.diff()
    counts = torch.where(lens > 1, (lens + size - 1) // size, 0)
    firsts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    row = torch.arange(bound, device=lens.device)
    request = torch.searchsorted(firsts[1:], row, right=True).clamp_max(batch.num_requests - 1)
    number = row - firsts[request]
    left = torch.where(row < firsts[-1], lens[request] - number * size, 0)
    table = torch.stack([request, number, batch.query_start[request] + number * size, left], dim=1)
    return table.to(torch.int32), firsts.to(torch.int32)
