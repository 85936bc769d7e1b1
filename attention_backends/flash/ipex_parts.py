"""A step as IPEX's kernels take it: requests that one call serves, with int32 tables and lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch.nn.functional import pad

from ..metadata import StepMetadata

GATHERED_BLOCK = 64
"""Block size of the small cache that gathered K and V are laid into."""


@dataclass(frozen=True, slots=True)
class DecodeView:
    """What the decode kernel is told of a part's requests: (b, n) kernel blocks, (b,) keys in them, the most keys."""

    tables: torch.Tensor
    seq_lens: torch.Tensor
    longest: int


@dataclass(frozen=True, slots=True)
class Part:
    """Requests of a step that one kernel call serves. Tables and lengths are int32."""

    rows: torch.Tensor | None
    """(t,) int64: query rows of these requests; ``None`` for all rows of the step."""
    tables: torch.Tensor
    """(b, max_blocks)."""
    seq_lens: torch.Tensor
    """(b,)."""
    query_start: torch.Tensor
    """(b + 1,)."""
    key_start: torch.Tensor
    """(b + 1,)."""
    longest_query: int
    longest: int
    decode: bool
    """True when every request has one query."""
    decode_views: dict[tuple[int, int | None], DecodeView]
    """By kernel blocks per page and sliding window; made once, shared by the layers of a group."""


def part_of(step: StepMetadata, requests: list[int]) -> Part:
    """The part of a step that holds ``requests``, which are in order."""
    device = step.block_table.device
    lens = [step.query_lens_host[index] for index in requests]
    seq_lens = [step.seq_lens_host[index] for index in requests]
    starts = (0, *accumulate(step.query_lens_host))
    whole = sum(lens) == step.num_tokens
    rows = [row for index in requests for row in range(starts[index], starts[index + 1])]
    return Part(
        rows=None if whole else torch.tensor(rows, device=device),
        tables=step.block_table[torch.tensor(requests, device=device)].contiguous(),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
        query_start=_starts(lens, device),
        key_start=_starts(seq_lens, device),
        longest_query=max(lens),
        longest=max(seq_lens),
        decode=max(lens) == 1,
        decode_views={},
    )


def decode_view(part: Part, block_size: int, kernel_block: int, pages: int, window: int | None) -> DecodeView:
    """The part's tables in kernel blocks, ``pages`` of them from one page to the next; with a window, its end only.

    The decode kernel masks what a window has left, but reads it: those blocks may belong to others by now.
    """
    inside = torch.arange(block_size // kernel_block, dtype=torch.int32, device=part.tables.device)
    tables = (part.tables[:, :, None] * pages + inside).flatten(1)
    if window is None:
        return DecodeView(tables, part.seq_lens, part.longest)
    first = (part.seq_lens - window).clamp(min=0) // kernel_block
    most = min(part.longest, window + kernel_block - 1)
    columns = first[:, None] + torch.arange(-(-most // kernel_block), device=first.device)
    tables = tables.gather(1, columns.clamp(max=tables.shape[1] - 1))
    return DecodeView(tables, part.seq_lens - first * kernel_block, most)


def gathered_part(step: StepMetadata, device: torch.device) -> Part:
    """All requests of a step over blocks that lie one request after the other."""
    counts = [-(-length // GATHERED_BLOCK) for length in step.seq_lens_host]
    first = (0, *accumulate(counts))
    tables = torch.zeros(len(counts), max(counts), dtype=torch.int32, device=device)
    for index, count in enumerate(counts):
        tables[index, :count] = torch.arange(first[index], first[index] + count)
    return Part(
        rows=None,
        tables=tables,
        seq_lens=step.seq_lens,
        query_start=_starts(step.query_lens_host, device),
        key_start=_starts(step.seq_lens_host, device),
        longest_query=max(step.query_lens_host),
        longest=max(step.seq_lens_host),
        decode=False,
        decode_views={},
    )


def as_blocks(gathered: Sequence[torch.Tensor], width: int) -> torch.Tensor:
    """Per request (length, Hk, D) -> (num_blocks, Hk, GATHERED_BLOCK, width), filled up with zeros."""
    blocks = []
    for rows in gathered:
        filled = pad(rows, (0, width - rows.shape[-1], 0, 0, 0, -rows.shape[0] % GATHERED_BLOCK))
        blocks.append(filled.view(-1, GATHERED_BLOCK, *filled.shape[1:]).transpose(1, 2))
    return torch.cat(blocks).contiguous()


def _starts(lens: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor((0, *accumulate(lens)), dtype=torch.int32, device=device)
