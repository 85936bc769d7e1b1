"""One step as state mixers see it: packed tokens, and where each request's state lies."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar, cast

import torch

from ...errors import RequestError

Made = TypeVar("Made")


class StepTables:
    """What kernels derive from a step (index tensors, mostly), made once and shared by all layers of the step."""

    __slots__ = ("_made",)

    def __init__(self) -> None:
        self._made: dict[Hashable, object] = {}

    def get(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What ``make`` returned the first time that ``key`` was asked for."""
        if key not in self._made:
            self._made[key] = make()
        return cast(Made, self._made[key])


@dataclass(frozen=True, slots=True, kw_only=True)
class StateBatch:
    """B requests with T tokens in all, packed request after request; a decode is a request with one token.

    In a captured step the tensors are slices of persistent buffers and nothing here may wait for the device. One of
    decodes is ``decode_only``: kernels then use B, ``slots`` and ``fresh`` only, and token ``i`` belongs to request
    ``i``. In any other, ``query_lens_host`` is None, ``num_ragged`` bounds the longer requests, and a request may have
    no token.
    """

    query_start: torch.Tensor
    """(B + 1,) int32: request ``i`` owns tokens ``query_start[i]:query_start[i + 1]``."""
    slots: torch.Tensor
    """(B,) int32: the page that holds a request's state; -1 for padding: reads and writes nothing, returns zeros."""
    fresh: torch.Tensor
    """(B,) bool: no state before this step. The state starts from zeros and the page is never read."""
    max_query_len: int
    """Most tokens that any request has in this step."""
    query_lens_host: tuple[int, ...] | None = None
    """Tokens of each request, where the host knows them."""
    decode_only: bool = False
    """Every request has exactly one token."""
    num_ragged: int | None = None
    """Only so many requests, the last ones, may have several tokens; ``None`` if any may."""
    tables: StepTables = field(default_factory=StepTables, init=False, repr=False, compare=False)
    """What kernels derived from this step."""

    @property
    def num_requests(self) -> int:
        """B."""
        return self.slots.shape[0]

    @property
    def first_ragged(self) -> int:
        """The first request that may have several tokens."""
        return 0 if self.num_ragged is None else self.num_requests - self.num_ragged

    @property
    def may_have_decodes(self) -> bool:
        """False if the host knows that no request has a single token."""
        return self.query_lens_host is None or 1 in self.query_lens_host

    def lens(self) -> tuple[int, ...]:
        """Tokens of each request; waits for the device if the host does not know them."""
        if self.decode_only:
            return (1,) * self.num_requests
        if self.query_lens_host is not None:
            return self.query_lens_host
        starts = self.query_start.tolist()
        return tuple(end - start for start, end in pairwise(starts))


def check_batch(batch: StateBatch, num_tokens: int) -> None:
    """Refuse a step whose sizes contradict each other; looks at the host's numbers only.

    :raises RequestError: naming the two numbers that clash.
    """
    requests = batch.num_requests
    if batch.query_start.shape[0] != requests + 1 or batch.fresh.shape[0] != requests:
        raise RequestError(
            f"a step of {requests} slots needs {requests + 1} query starts and {requests} fresh flags, not "
            f"{batch.query_start.shape[0]} and {batch.fresh.shape[0]}",
            option="query_start",
            value=batch.query_start.shape[0],
            expected=requests + 1,
        )
    if batch.decode_only and num_tokens != requests:
        raise RequestError(
            f"a step of {requests} decodes has {requests} tokens, not {num_tokens}",
            option="decode_only",
            value=num_tokens,
            expected=requests,
        )
    known = batch.query_lens_host
    if known is not None and (len(known) != requests or sum(known) != num_tokens):
        raise RequestError(
            f"query_lens_host counts {sum(known)} tokens of {len(known)} requests, and the step has {num_tokens} "
            f"tokens of {requests}",
            option="query_lens_host",
            value=sum(known),
            expected=num_tokens,
        )
