"""Which request computes which tokens in a packed step, in the order in which they are packed. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from ..requests import Request
from ..scheduler import Step

ON_DEVICE = -1
"""Stands for a token that was sampled and not read yet."""


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens ``start`` up to ``start + length`` of a request."""

    request: Request
    start: int
    length: int
    is_decode: bool

    @property
    def end(self) -> int:
        """Tokens in the cache after the step."""
        return self.start + self.length

    @property
    def samples(self) -> bool:
        """True if all tokens there are will be computed, so that the last logits choose a new one."""
        return self.end == self.request.num_tokens

    def tokens(self) -> list[int]:
        """Token ids; :data:`ON_DEVICE` for the last one if only the device knows it."""
        known = list(self.request.tokens(self.start, self.end))
        return known + [ON_DEVICE] * (self.length - len(known))


def rows_of(step: Step) -> tuple[Row, ...]:
    """Decodes first, then prefill chunks."""
    decodes = (Row(request, request.num_computed, 1, True) for request in step.decodes)
    chunks = (Row(chunk.request, chunk.start, chunk.length, False) for chunk in step.prefills)
    return (*decodes, *chunks)
