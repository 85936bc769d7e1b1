"""Sizes of steps that have a graph of their own. No torch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from .rows import Row

TOKENS = (16, 32, 64, 128, 256, 384, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048)
"""Sizes of steps with prefill. Products are cut into tiles of 128 tokens: Falcon-H1-7B's shape takes 12.0 ms for 384 on
one H200, and 12.5 for 320. Beyond the last the device has more to do than the host: 44 layers take the host 50 ms."""
WIDE = (64, 128, 256, 512, 768, 1024, 1536, 2048)
"""Those that are captured for many decodes too."""
CHUNKS = 32
"""Most prefill chunks of such a step."""
ALIGNED = 16
"""Rows of decodes are a multiple of this, so that what lies behind them in memory is aligned."""


def decode_buckets(max_num_seqs: int) -> tuple[int, ...]:
    """Batch sizes with a graph of their own: close together where a padding row costs much, far apart above."""
    sizes = [1, 2, 4, 8, *range(16, 64, 8), *range(64, 128, 16), *range(128, 256, 32), *range(256, max_num_seqs, 64)]
    return (*(size for size in sizes if size < max_num_seqs), max_num_seqs)


@dataclass(frozen=True, slots=True, order=True)
class RaggedBucket:
    """Steps of up to ``tokens`` tokens: decodes in the first rows, prefill chunks in the last ``num_ragged``.

    The last row of all is nobody's: it takes the tokens that are missing.
    """

    tokens: int
    decodes: int
    num_ragged: int

    @property
    def rows(self) -> int:
        """Rows in all."""
        return self.decodes + self.num_ragged

    def places(self, rows: Sequence[Row]) -> list[int]:
        """The row of each of ``rows``, decodes first."""
        first = sum(row.is_decode for row in rows)
        return [*range(first), *range(self.decodes, self.decodes + len(rows) - first)]

    def holds(self, rows: Sequence[Row]) -> bool:
        """Whether a step of ``rows`` fits."""
        decodes = sum(row.is_decode for row in rows)
        return (
            decodes <= self.decodes
            and len(rows) - decodes < self.num_ragged
            and sum(row.length for row in rows) <= self.tokens
        )


def ragged_buckets(max_num_seqs: int, max_num_batched_tokens: int) -> tuple[RaggedBucket, ...]:
    """Buckets with prefill, ascending: for few decodes beside it, and for as many as may run."""
    last = bisect_left(TOKENS, max_num_batched_tokens)
    all_decodes = -(-max_num_seqs // ALIGNED) * ALIGNED
    ragged = min(max_num_seqs, CHUNKS) + 1
    return tuple(
        RaggedBucket(tokens, decodes, ragged)
        for tokens in TOKENS[: last + 1]
        for decodes in sorted({ALIGNED, all_decodes})
        if decodes == ALIGNED or tokens in WIDE
    )
