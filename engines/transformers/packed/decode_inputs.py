"""The numbers of a step of decodes in one persistent tensor, copied to the device in one piece."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ....attention_backends.persistent import copy_to_persistent
from ....cache.staging import on_host
from ....hybrid.mixers.batch import StateBatch
from .rows import ON_DEVICE, Row
from .seats import Seats

_FIELDS = 3
"""Ids, positions and seats; the slots of each state group follow."""


class DecodeInputs:
    """A bucket of ``size`` rows lies at the start of the buffer, field after field, ``size`` numbers each.

    :param state_groups: indices of the groups whose layers keep a state.
    """

    def __init__(self, seats: Seats, state_groups: Sequence[int], max_num_seqs: int, device: torch.device) -> None:
        self._seats, self._groups, self._device = seats, tuple(state_groups), device
        self._buffer = torch.zeros((_FIELDS + len(self._groups)) * max_num_seqs, dtype=torch.int64, device=device)
        self._starts = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=device)
        self._fresh = torch.zeros(max_num_seqs, dtype=torch.bool, device=device)

    def fill(self, rows: Sequence[Row], seats: Sequence[int], size: int) -> None:
        """Queue the numbers of ``rows``; those up to ``size`` are padding, without state and with the spare seat."""
        missing = size - len(rows)
        fields = [
            [*(row.tokens()[0] for row in rows), *[0] * missing],
            [*(row.start for row in rows), *[0] * missing],
            [*seats, *[self._seats.spare] * missing],
        ]
        for group in self._groups:
            fields.append([*(row.request.tables[group].blocks[0] for row in rows), *[-1] * missing])
        numbers = [number for field in fields for number in field]
        copy_to_persistent(self._buffer, on_host(numbers, torch.int64, self._device))

    def ids(self, size: int) -> torch.Tensor:
        """(size,) token ids: the host's, or the last sampled one of the row's seat."""
        known = self._field(0, size)
        return torch.where(known == ON_DEVICE, self._seats.last_tokens[self._field(2, size)], known)

    def positions(self, size: int) -> torch.Tensor:
        """(size,) int64."""
        return self._field(1, size)

    def keep(self, tokens: torch.Tensor) -> None:
        """Store the tokens (size,) that were sampled in their rows' seats."""
        self._seats.last_tokens.index_copy_(0, self._field(2, tokens.shape[0]), tokens)

    def states(self, size: int) -> dict[int, StateBatch]:
        """Per state group the step as its mixers see it; call it inside the graph."""
        return {
            group: StateBatch(
                query_start=self._starts[: size + 1],
                slots=self._field(_FIELDS + index, size).int(),
                fresh=self._fresh[:size],
                max_query_len=1,
                decode_only=True,
            )
            for index, group in enumerate(self._groups)
        }

    def _field(self, index: int, size: int) -> torch.Tensor:
        return self._buffer[index * size : (index + 1) * size]
