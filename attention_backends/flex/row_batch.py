"""Query tokens as padded rows of one kernel call, and back: (T, Hq, D) <-> (R, Hq, L, D)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...cache.staging import stage
from .rows import RowGroup


@dataclass(frozen=True, slots=True)
class RowBatch:
    """A row group and where its query tokens stand, on the device."""

    group: RowGroup
    batch_rows: int
    """R: the group's rows and padding."""
    facts: torch.Tensor
    """(5, R) int32, as the Triton kernels have them: rows 3 and 4 are each row's first token and its tokens."""
    tokens: torch.Tensor | None
    """(n,) int64: rows of the step's query tensor; ``None`` where Triton packs."""
    places: torch.Tensor | None
    """(n,) int64: where they stand in the padded rows."""
    run: tuple[int, int] | None
    """(first token, tokens) if the rows are full and follow each other, so that a view does."""


def row_batch(group: RowGroup, batch_rows: int, device: torch.device, *, fused: bool) -> RowBatch:
    """``group`` padded to ``batch_rows``."""
    rows, padding = group.rows, batch_rows - len(group.rows)
    first, counts = [row.token for row in rows] + [0] * padding, [row.count for row in rows] + [0] * padding
    facts = stage([*[0] * (3 * batch_rows), *first, *counts], torch.int32, device).view(5, batch_rows)
    run = None
    follow = all(row.token == rows[0].token + index * group.length for index, row in enumerate(rows))
    # Only the last row may be ragged: it then holds queries of somebody else, which nobody reads.
    if not padding and follow and all(row.count == group.length for row in rows[:-1]):
        run = (rows[0].token, sum(counts))
    if fused:
        return RowBatch(group, batch_rows, facts, None, None, run)
    tokens: list[int] = []
    places: list[int] = []
    for index, row in enumerate(rows):
        tokens.extend(range(row.token, row.token + row.count))
        places.extend(range(index * group.length, index * group.length + row.count))
    both = stage([*tokens, *places], torch.int64, device).view(2, -1)
    return RowBatch(group, batch_rows, facts, both[0], both[1], None)


def pack(query: torch.Tensor, batch: RowBatch) -> torch.Tensor:
    """(R, Hq, L, D): a view where the tokens already lie as rows, else a copy with zeros as padding."""
    length, (_, heads, size) = batch.group.length, query.shape
    rows = batch.batch_rows
    if batch.run is not None and batch.run[0] + rows * length <= len(query):
        start = batch.run[0]
        return query[start : start + rows * length].view(rows, length, heads, size).transpose(1, 2)
    if batch.tokens is not None:
        out = query.new_zeros(rows * length, heads, size)
        out[batch.places] = query[batch.tokens]
        return out.view(rows, length, heads, size).transpose(1, 2)
    from .kernels.rows import pack_rows

    # In the memory order of the view above, so that both are one compiled variant.
    out = query.new_empty(rows, length, heads, size)
    pack_rows[(rows, heads)](
        query, query.stride(0), query.stride(1), batch.facts, batch.facts.stride(0), out,
        out.stride(0), out.stride(2), out.stride(1), GROUP=1, LENGTH=length, QUERIES=_power_of_two(length), SIZE=size,
        WIDTH=_power_of_two(size), num_warps=4,
    )  # fmt: skip
    return out.transpose(1, 2)


def unpack(rows: torch.Tensor, batch: RowBatch, output: torch.Tensor) -> None:
    """Write (R, Hq, L, Dv) to their places in (T, Hq, Dv)."""
    length, size = batch.group.length, rows.shape[-1]
    if batch.tokens is not None and batch.places is not None:
        output[batch.tokens] = rows.transpose(1, 2).reshape(batch.batch_rows * length, -1, size)[batch.places]
        return
    from .kernels.rows import unpack_rows

    unpack_rows[(batch.batch_rows, rows.shape[1])](
        rows, rows.stride(0), rows.stride(1), rows.stride(2), batch.facts, batch.facts.stride(0), output,
        HEADS=rows.shape[1], QUERIES=_power_of_two(length), SIZE=size, WIDTH=_power_of_two(size), num_warps=4,
    )  # fmt: skip


def as_tokens(rows: torch.Tensor, batch: RowBatch, num_tokens: int) -> torch.Tensor | None:
    """(T, Hq, Dv) without a copy, if the rows are the whole step one after the other."""
    if batch.run != (0, num_tokens):
        return None
    flat = rows.transpose(1, 2)
    return flat.view(-1, *flat.shape[2:])[:num_tokens] if flat.is_contiguous() else None


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
