"""States in and out of their pages, and a step as decodes and longer requests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..batch import StateBatch


@dataclass(frozen=True, slots=True)
class Rows:
    """Some requests of a step that are computed together, and their tokens."""

    requests: torch.Tensor
    """(R,) int64: numbers of the requests."""
    tokens: torch.Tensor
    """int64: the token of each decode, or all tokens of the one longer request."""
    slots: torch.Tensor
    """(R,) int64, all >= 0."""
    fresh: torch.Tensor
    """(R,) bool."""

    def read(self, state: torch.Tensor) -> torch.Tensor:
        """(R, ...) float32 states; zeros for fresh requests, whose pages are not looked at."""
        states = torch.zeros((len(self.slots), *state.shape[1:]), dtype=torch.float32, device=state.device)
        known = ~self.fresh
        states[known] = state[self.slots[known]].float()
        return states

    def write(self, state: torch.Tensor, states: torch.Tensor) -> None:
        """Store the new states in the pages."""
        state[self.slots] = states.to(state.dtype)


def decodes(batch: StateBatch) -> Rows:
    """The requests with one token and a page."""
    lens = batch.lens()
    starts = _starts(lens)
    slots = batch.slots.tolist()
    chosen = [index for index, (length, slot) in enumerate(zip(lens, slots, strict=True)) if length == 1 and slot >= 0]
    return _rows(batch, chosen, [starts[index] for index in chosen])


def longer(batch: StateBatch) -> Iterator[Rows]:
    """Each request with several tokens and a page, by itself."""
    lens = batch.lens()
    slots = batch.slots.tolist()
    for index, (start, length) in enumerate(zip(_starts(lens), lens, strict=True)):
        if length > 1 and slots[index] >= 0:
            yield _rows(batch, [index], list(range(start, start + length)))


def _starts(lens: tuple[int, ...]) -> list[int]:
    starts, position = [], 0
    for length in lens:
        starts.append(position)
        position += length
    return starts


def _rows(batch: StateBatch, requests: list[int], tokens: list[int]) -> Rows:
    device = batch.slots.device
    chosen = torch.tensor(requests, dtype=torch.int64, device=device)
    return Rows(
        requests=chosen,
        tokens=torch.tensor(tokens, dtype=torch.int64, device=device),
        slots=batch.slots[chosen].long(),
        fresh=batch.fresh[chosen],
    )
