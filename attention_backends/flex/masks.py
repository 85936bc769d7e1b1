"""What flex_attention asks of each score: a mask and a modifier, in logical positions of the row's own request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..interface import AttentionCall
from .views import FlatCache

Modifier = Callable[..., torch.Tensor]


@dataclass(frozen=True, slots=True)
class BlockLists:
    """What one kernel call visits. R rows, padded; physical kernel blocks of the flat cache."""

    masked_counts: torch.Tensor
    """(R, 1, 1) int32."""
    masked: torch.Tensor
    """(R, 1, 1, C) int32, of which only the first ``masked_counts`` of each row mean anything."""
    whole_counts: torch.Tensor
    whole: torch.Tensor
    facts: RowFacts


@dataclass(frozen=True, slots=True)
class RowFacts:
    """What masks know of R rows, all on the device."""

    position: torch.Tensor
    """(R,) int32: of the row's first query token in its sequence."""
    seq_len: torch.Tensor
    """(R,) int32."""
    request: torch.Tensor
    """(R,) int32: in the order of the step."""
    places: torch.Tensor
    """(num_blocks + 1,) int32: where in its sequence each visited block of the cache stands.

    One map serves all requests: a block that several share is a common prefix, at the same place in each.
    """
    ragged: tuple[torch.Tensor, torch.Tensor] | None = None
    """(R,) int32 each, where a row has one ragged block: its kernel block in the cache, and how many tokens that lies
    from its place in the sequence. Spares the mask a look into ``places``."""


def mark_rows(lists: BlockLists) -> None:
    """Let the number of rows be a symbol, so that it changes without a compilation."""
    facts = lists.facts
    for tensor in (
        lists.masked_counts, lists.masked, lists.whole_counts, lists.whole, facts.position, facts.seq_len, facts.request
    ):  # fmt: skip
        torch._dynamo.mark_dynamic(tensor, 0)
    for tensor in facts.ragged or ():
        torch._dynamo.mark_dynamic(tensor, 0)


def modifiers(
    facts: RowFacts, cache: FlatCache, call: AttentionCall, group: int, kernel_block: int
) -> tuple[Modifier, Modifier | None]:
    """The mask of ragged blocks and the score modifier, or ``None``.

    :param group: query heads that lie beside each other as query rows of one head; 1 where each is a head.
    """
    stride, block_size, places = cache.block_stride, cache.block_size, facts.places
    position, seq_len, request, ragged = facts.position, facts.seq_len, facts.request, facts.ragged
    causal, window, custom = call.causal, call.sliding_window, call.mask_mod

    def mask(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        if ragged is not None:
            return (kv // kernel_block != ragged[0][b]) | (kv - ragged[1][b] <= position[b])
        key = places[kv // stride] * block_size + kv % stride
        query = position[b] + q // group
        seen = query >= key if causal else key < seq_len[b]
        if window is not None:
            seen = seen & (query - key < window)
            if not causal:
                seen = seen & (key - query < window)
        if custom is not None:
            seen = seen & custom(request[b], h * group + q % group, query, key)
        return seen

    soft_cap, own, slopes = call.soft_cap, call.score_mod, call.alibi_slopes
    if soft_cap is None and own is None and slopes is None:
        return mask, None

    def score(value: torch.Tensor, b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        if soft_cap is not None:
            value = soft_cap * torch.tanh(value / soft_cap)
        if slopes is not None or own is not None:
            key = places[kv // stride] * block_size + kv % stride
            query, head = position[b] + q // group, h * group + q % group
            if slopes is not None:
                value = value + slopes[head] * (key - query)
            if own is not None:
                value = own(value, request[b], head, query, key)
        return value

    return mask, score
