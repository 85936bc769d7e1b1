"""Tensors of a step that stay where they are, so that a captured graph reads every later step's values."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..cache.block_table import BlockTable
from ..cache.staging import on_host, stage
from ..cache.write import PADDING_SLOT
from ..errors import ConfigError, IntegrityError
from .metadata import StepMetadata


def copy_to_persistent(persistent: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Copy ``source`` into the leading corner of ``persistent``, and return that slice.

    The slice has ``persistent``'s address and strides in every step, which is what a captured kernel knows.

    :raises IntegrityError: if ``source`` does not fit, or is of another dtype.
    """
    fits = source.dim() == persistent.dim() and all(
        size <= room for size, room in zip(source.shape, persistent.shape, strict=True)
    )
    if not fits or source.dtype != persistent.dtype:
        raise IntegrityError(
            f"a {source.dtype} tensor of shape {tuple(source.shape)} does not fit the persistent {persistent.dtype}"
            f" one of shape {tuple(persistent.shape)}",
            value=tuple(source.shape),
            expected=tuple(persistent.shape),
        )
    corner = persistent[tuple(slice(size) for size in source.shape)]
    corner.copy_(source, non_blocking=True)
    return corner


class StepBuffers:
    """The step of one layer group, in persistent tensors: rows of requests, filled with what changed.

    Copies are queued in stream order from pinned memory that lives until they are done, so the next step may be
    filled while the device still works on this one. The tensors take
    ``max_num_seqs * (max_blocks + 2) * 4 + max_num_batched_tokens * 8`` bytes: the blocks that a sequence can
    have, never those of the cache.

    :param max_num_seqs: rows of the largest step.
    :param max_num_batched_tokens: query tokens of the largest step.
    :param max_blocks: blocks of the longest sequence.
    :param block_size: tokens of a block.
    """

    def __init__(
        self, *, max_num_seqs: int, max_num_batched_tokens: int, max_blocks: int, block_size: int, device: torch.device
    ) -> None:
        self._block_size, self._device = block_size, device
        self._query_start = torch.zeros(max_num_seqs + 1, dtype=torch.int32, device=device)
        self._seq_lens = torch.zeros(max_num_seqs, dtype=torch.int32, device=device)
        self._block_table = torch.zeros(max_num_seqs, max_blocks, dtype=torch.int32, device=device)
        self._slots = torch.full((max_num_batched_tokens,), PADDING_SLOT, dtype=torch.int64, device=device)
        self._written: list[tuple[BlockTable, int]] = []

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(t.nbytes for t in (self._query_start, self._seq_lens, self._block_table, self._slots))

    def fill(
        self, tables: Sequence[BlockTable], starts: Sequence[int], lens: Sequence[int], *, rows: int | None = None
    ) -> StepMetadata:
        """The step in which request ``i`` computes ``lens[i]`` tokens after its first ``starts[i]``.

        Of a request that keeps its row, only blocks that are new since the last step are copied. Blocks that a
        sliding window has passed keep their old ids.

        :param rows: the bucket of a step of decodes: rows past the requests' are padding of one token each.
        :raises IntegrityError: for a step that is larger than the buffers, or a token without a block.
        """
        padding = (rows or len(tables)) - len(tables)
        query_lens = (*lens, *[1] * padding)
        seq_lens = (*(start + count for start, count in zip(starts, lens, strict=True)), *[0] * padding)
        slots = [s for t, start, n in zip(tables, starts, lens, strict=True) for s in t.slots(start, start + n)]
        self._check_room(tables, len(query_lens), sum(query_lens), padding)
        ends = [0]
        for count in query_lens:
            ends.append(ends[-1] + count)
        self._copy(self._query_start, ends)
        self._copy(self._seq_lens, seq_lens)
        self._copy(self._slots, [*slots, *[PADDING_SLOT] * padding])
        self._copy_new_blocks(tables)
        return self._step(query_lens, seq_lens, captured=False)

    def captured(self, rows: int, max_seq_len: int) -> StepMetadata:
        """The step to capture a graph with, for ``rows`` decodes of up to ``max_seq_len`` tokens each.

        All of its rows are padding, so that a capture touches no request.
        """
        self.fill((), (), (), rows=rows)
        return self._step((1,) * rows, (max_seq_len,) * rows, captured=True)

    def _step(self, query_lens: tuple[int, ...], seq_lens: tuple[int, ...], *, captured: bool) -> StepMetadata:
        count = len(query_lens)
        return StepMetadata(
            query_start=self._query_start[: count + 1],
            seq_lens=self._seq_lens[:count],
            block_table=self._block_table[:count],
            slot_mapping=self._slots[: sum(query_lens)],
            query_lens_host=query_lens,
            seq_lens_host=seq_lens,
            block_size=self._block_size,
            captured=captured,
        )

    def _copy(self, persistent: torch.Tensor, values: Sequence[int]) -> None:
        if values:
            copy_to_persistent(persistent, on_host(values, persistent.dtype, self._device))

    def _copy_new_blocks(self, tables: Sequence[BlockTable]) -> None:
        """Scatter the ids that the rows lack: a table only grows, and a request that starts over has a new one."""
        width = self._block_table.shape[1]
        places: list[int] = []
        ids: list[int] = []
        for row, table in enumerate(tables):
            known = self._known(row, table)
            places.extend(range(row * width + known, row * width + len(table.blocks)))
            ids.extend(table.blocks[known:])
        self._written[: len(tables)] = [(table, len(table.blocks)) for table in tables]
        if ids:
            both = stage([*places, *ids], torch.int32, self._device).view(2, -1)
            self._block_table.view(-1).index_put_((both[0].long(),), both[1])

    def _known(self, row: int, table: BlockTable) -> int:
        """Blocks of ``table`` that its row has already."""
        if row >= len(self._written):
            return 0
        before, count = self._written[row]
        return count if before is table else 0

    def _check_room(self, tables: Sequence[BlockTable], rows: int, tokens: int, padding: int) -> None:
        longest = max((len(table.blocks) for table in tables), default=0)
        for what, size, room in (
            ("requests", rows, self._seq_lens.shape[0]),
            ("tokens", tokens, self._slots.shape[0]),
            ("blocks of one request", longest, self._block_table.shape[1]),
        ):
            if size > room:
                raise IntegrityError(f"a step of {size} {what} exceeds its buffers' {room}", value=size, expected=room)
        if padding < 0:
            raise ConfigError(
                f"a bucket of {len(tables) + padding} rows cannot hold {len(tables)} requests",
                option="rows",
                value=rows,
                expected=f">= {len(tables)}",
            )
