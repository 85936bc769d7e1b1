"""The numbers of a captured step with prefill in one persistent tensor, copied to the device in one piece."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ....attention_backends.persistent import copy_to_persistent
from ....cache.staging import on_host
from ....hybrid.mixers.batch import StateBatch
from .buckets import RaggedBucket
from .rows import ON_DEVICE, Row
from .seats import Seats


class RaggedInputs:
    """A bucket lies at the start of the buffer: ids and positions of T tokens, then fields of one number a row.

    Those are the places of tokens that are sampled from, their seats, first tokens, freshness, and the state slots of
    each group. A token that only the device knows stands as -1 less its seat.

    :param state_groups: indices of the groups whose layers keep a state.
    """

    def __init__(
        self, seats: Seats, state_groups: Sequence[int], buckets: Sequence[RaggedBucket], device: torch.device
    ) -> None:
        self._seats, self._groups, self._device = seats, tuple(state_groups), device
        size = max(sum(self._sizes(bucket)) for bucket in buckets)
        self._buffer = torch.zeros(size, dtype=torch.int64, device=device)

    def fill(self, rows: Sequence[Row], seats: Sequence[int], bucket: RaggedBucket) -> None:
        """Queue the numbers of ``rows``; what is missing to ``bucket`` is padding, without states."""
        places, count = bucket.places(rows), bucket.rows
        ids: list[int] = []
        positions: list[int] = []
        ends: list[int] = []
        chosen: list[int] = []
        firsts, fresh = [0] * (count + 1), [0] * count
        slots = [[-1] * count for _ in self._groups]
        for row, seat, place in zip(rows, seats, places, strict=True):
            ids += [-1 - seat if token == ON_DEVICE else token for token in row.tokens()]
            positions += range(row.start, row.end)
            firsts[place + 1], fresh[place] = row.length, int(row.start == 0)
            for group, of_group in zip(self._groups, slots, strict=True):
                of_group[place] = row.request.tables[group].blocks[0]
            if row.samples:
                ends.append(len(ids) - 1)
                chosen.append(seat)
        missing = bucket.tokens - len(ids)
        firsts[-1] = missing
        for index in range(count):
            firsts[index + 1] += firsts[index]
        ids += [0] * missing
        positions += [0] * missing
        ends += [0] * (count - len(ends))
        chosen += [self._seats.spare] * (count - len(chosen))
        fields = (ids, positions, ends, chosen, firsts, fresh, *slots)
        numbers = [number for field in fields for number in field]
        copy_to_persistent(self._buffer, on_host(numbers, torch.int64, self._device))

    def ids(self, bucket: RaggedBucket) -> torch.Tensor:
        """(T,) token ids: the host's, or the last sampled one of a seat."""
        known = self._field(0, bucket)
        return torch.where(known < 0, self._seats.last_tokens[(-1 - known).clamp_min(0)], known)

    def positions(self, bucket: RaggedBucket) -> torch.Tensor:
        """(T,) int64."""
        return self._field(1, bucket)

    def ends(self, bucket: RaggedBucket) -> torch.Tensor:
        """(rows,) int64: the tokens that are sampled from come first; 0 for what is missing."""
        return self._field(2, bucket)

    def keep(self, tokens: torch.Tensor, bucket: RaggedBucket) -> None:
        """Store the tokens (rows,) that were sampled in their seats."""
        self._seats.last_tokens.index_copy_(0, self._field(3, bucket), tokens)

    def states(self, bucket: RaggedBucket) -> dict[int, StateBatch]:
        """Per state group the step as its mixers see it; call it inside the graph."""
        query_start, fresh = self._field(4, bucket).int(), self._field(5, bucket).bool()
        return {
            group: StateBatch(
                query_start=query_start,
                slots=self._field(6 + index, bucket).int(),
                fresh=fresh,
                max_query_len=bucket.tokens,
                num_ragged=bucket.num_ragged,
            )
            for index, group in enumerate(self._groups)
        }

    def _sizes(self, bucket: RaggedBucket) -> list[int]:
        rows = bucket.rows
        return [bucket.tokens, bucket.tokens, rows, rows, rows + 1, rows, *[rows] * len(self._groups)]

    def _field(self, index: int, bucket: RaggedBucket) -> torch.Tensor:
        sizes = self._sizes(bucket)
        start = sum(sizes[:index])
        return self._buffer[start : start + sizes[index]]
