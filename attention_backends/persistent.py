"""Tensors of a step that stay where they are, so that a captured graph reads every later step's values."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate

import torch

from ..cache.block_table import BlockTable
from ..cache.staging import pinned, stage
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
        # What every step changes lies in one piece, each part of it aligned, so that it takes one copy.
        self._room = -(-(max_num_seqs + 1) // 4) * 4
        self._changing = torch.zeros(8 * self._room + 8 * max_num_batched_tokens, dtype=torch.uint8, device=device)
        numbers = self._changing[: 8 * self._room].view(torch.int32)
        self._query_start = numbers[: max_num_seqs + 1]
        self._seq_lens = numbers[self._room : self._room + max_num_seqs]
        self._slots = self._changing[8 * self._room :].view(torch.int64)
        self._slots.fill_(PADDING_SLOT)
        self._block_table = torch.zeros(max_num_seqs, max_blocks, dtype=torch.int32, device=device)
        self._written: dict[int, tuple[BlockTable, int]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self._changing.nbytes + self._block_table.nbytes

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
        if padding < 0:
            raise _too_small(rows, len(tables))
        return self._fill(tables, starts, lens, range(len(tables)), (*lens, *[1] * padding))

    def fill_ragged(
        self, tables: Sequence[BlockTable], starts: Sequence[int], lens: Sequence[int], *, places: Sequence[int],
        rows: int, tokens: int,
    ) -> StepMetadata:  # fmt: skip
        """The same for a captured step of ``tokens`` tokens: the last of ``rows`` rows takes those that are missing.

        :param places: the row of each request, ascending; rows without a request are empty.
        :raises IntegrityError: as :meth:`fill`.
        :raises ConfigError: if the requests or their tokens do not fit, or the last row is not free.
        """
        missing = tokens - sum(lens)
        if missing < 0 or (places and places[-1] >= rows - 1):
            raise _too_small(rows, len(tables))
        query_lens = [0] * rows
        query_lens[-1] = missing
        for place, count in zip(places, lens, strict=True):
            query_lens[place] = count
        return self._fill(tables, starts, lens, places, tuple(query_lens))

    def dummy(self, lens: Sequence[int], seq_lens: Sequence[int]) -> StepMetadata:
        """A step of nobody's requests, which writes nothing and reads the null block, where others have theirs."""
        self._check_room((), len(lens), sum(lens))
        step = self._step(tuple(lens), tuple(seq_lens), captured=False)
        step.query_start.copy_(torch.tensor([0, *accumulate(lens)], dtype=torch.int32))
        step.seq_lens.copy_(torch.tensor(seq_lens, dtype=torch.int32))
        step.slot_mapping.fill_(PADDING_SLOT)
        self._block_table.zero_()
        self._written.clear()
        return step

    def captured(self, rows: int, max_seq_len: int) -> StepMetadata:
        """The step to capture a graph with, for ``rows`` decodes of up to ``max_seq_len`` tokens each.

        All of its rows are padding, so that a capture touches no request.
        """
        self.fill((), (), (), rows=rows)
        return self._step((1,) * rows, (max_seq_len,) * rows, captured=True)

    def captured_ragged(self, rows: int, tokens: int, num_ragged: int, max_seq_len: int) -> StepMetadata:
        """The same for steps of ``tokens`` tokens, the last ``num_ragged`` of ``rows`` rows of any length."""
        step = self.fill_ragged((), (), (), places=(), rows=rows, tokens=tokens)
        return self._step(step.query_lens_host, (max_seq_len,) * rows, captured=True, num_ragged=num_ragged)

    def _fill(
        self, tables: Sequence[BlockTable], starts: Sequence[int], lens: Sequence[int], places: Sequence[int],
        query_lens: tuple[int, ...],
    ) -> StepMetadata:  # fmt: skip
        """Rows ``places`` are the requests', all others padding, whose tokens come last."""
        seq_lens = [0] * len(query_lens)
        for place, start, count in zip(places, starts, lens, strict=True):
            seq_lens[place] = start + count
        slots = [s for t, start, n in zip(tables, starts, lens, strict=True) for s in t.slots(start, start + n)]
        tokens = sum(query_lens)
        self._check_room(tables, len(query_lens), tokens)
        self._copy(seq_lens, list(accumulate(query_lens, initial=0)), [*slots, *[PADDING_SLOT] * (tokens - len(slots))])
        self._copy_new_blocks(tables, places)
        return self._step(query_lens, tuple(seq_lens), captured=False)

    def _step(
        self, query_lens: tuple[int, ...], seq_lens: tuple[int, ...], *, captured: bool, num_ragged: int = 0
    ) -> StepMetadata:
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
            num_ragged=num_ragged,
        )

    def _copy(self, seq_lens: Sequence[int], starts: Sequence[int], slots: Sequence[int]) -> None:
        """Queue one copy of all three, the first two filled up to the buffers' rows."""
        rows = [number for part in (starts, seq_lens) for number in (*part, *[0] * (self._room - len(part)))]
        image = bytearray(array("i", rows)) + bytearray(array("q", slots))
        copy_to_persistent(self._changing, pinned(torch.frombuffer(image, dtype=torch.uint8), self._device))

    def _copy_new_blocks(self, tables: Sequence[BlockTable], rows: Sequence[int]) -> None:
        """Scatter the ids that the rows lack: a table only grows, and a request that starts over has a new one."""
        width = self._block_table.shape[1]
        places: list[int] = []
        ids: list[int] = []
        for row, table in zip(rows, tables, strict=True):
            known = self._known(row, table)
            places.extend(range(row * width + known, row * width + len(table.blocks)))
            ids.extend(table.blocks[known:])
            self._written[row] = (table, len(table.blocks))
        if ids:
            both = stage([*places, *ids], torch.int32, self._device).view(2, -1)
            self._block_table.view(-1).index_put_((both[0].long(),), both[1])

    def _known(self, row: int, table: BlockTable) -> int:
        """Blocks of ``table`` that its row has already."""
        before, count = self._written.get(row, (None, 0))
        return count if before is table else 0

    def _check_room(self, tables: Sequence[BlockTable], rows: int, tokens: int) -> None:
        longest = max((len(table.blocks) for table in tables), default=0)
        for what, size, room in (
            ("requests", rows, self._seq_lens.shape[0]),
            ("tokens", tokens, self._slots.shape[0]),
            ("blocks of one request", longest, self._block_table.shape[1]),
        ):
            if size > room:
                raise IntegrityError(f"a step of {size} {what} exceeds its buffers' {room}", value=size, expected=room)


def _too_small(rows: int | None, requests: int) -> ConfigError:
    return ConfigError(
        f"a bucket of {rows} rows cannot hold {requests} requests",
        option="rows",
        value=rows,
        expected=f">= {requests}",
    )
