"""Where a plan's memory goes: what one request takes, byte by byte, and what a mix of requests wastes."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from ..cache.capacity import Holding, PoolShape
from ..cache.specs import AttentionSpec, LayerGroup, MambaSpec

LENGTHS = (1, 512, 4096, 32768)
"""Tokens of the requests that a plan shows the memory of, those that it serves."""


class Pooled(Protocol):
    """What memory is counted from: groups of layers that share one pool, such as a plan."""

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        """Groups that block ids are handed out to."""

    @property
    def shape(self) -> PoolShape:
        """How states and attention share the pool."""

    @property
    def holding(self) -> Holding:
        """How long blocks of a live request are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestMemory:
    """Bytes of the pool that one request of ``tokens`` tokens takes on one rank; they add up to what it takes."""

    tokens: int
    kv_bytes: int
    """K and V of its tokens."""
    tail_bytes: int
    """Slots of its last blocks that hold no token yet."""
    state_bytes: int
    """Its states, raw."""
    padding_bytes: int
    """What rounds pages up, and slots of a block that its group has no layer for."""

    @property
    def total_bytes(self) -> int:
        """All that it takes away from others."""
        return self.kv_bytes + self.tail_bytes + self.state_bytes + self.padding_bytes

    @property
    def waste(self) -> float:
        """Share that holds nothing, 0 to 1."""
        return (self.tail_bytes + self.padding_bytes) / self.total_bytes if self.total_bytes else 0.0

    def to_dict(self) -> dict[str, int]:
        """JSON-ready values."""
        return {
            "tokens": self.tokens,
            "kv_bytes": self.kv_bytes,
            "tail_bytes": self.tail_bytes,
            "state_bytes": self.state_bytes,
            "padding_bytes": self.padding_bytes,
            "total_bytes": self.total_bytes,
        }


def request_memory(pooled: Pooled, tokens: int) -> RequestMemory:
    """What one request of ``tokens`` tokens takes."""
    holding, shape = pooled.holding, pooled.shape
    states, blocks = holding.request_need(pooled.groups, tokens)
    taken = states * shape.state_page_bytes + blocks * shape.block_bytes
    kv, state = _needed(pooled.groups, holding, tokens)
    slots = sum(
        holding.group_blocks(group, tokens) * group.block_size * _bytes_per_token(group) for group in pooled.groups
    )
    return RequestMemory(
        tokens=tokens,
        kv_bytes=kv,
        tail_bytes=slots - kv,
        state_bytes=state,
        padding_bytes=taken - slots - state,
    )


def request_mixes(longest: int = LENGTHS[-1]) -> Mapping[str, tuple[int, ...]]:
    """Lengths of the requests that waste is published for, in tokens; the last mix is drawn with a fixed seed.

    :param longest: tokens of the longest request that is served; drawn lengths are cut to it, and mixes of longer
        requests left out.
    """
    source = random.Random(5)
    drawn = (round(math.exp(math.log(700) + source.gauss(0, 1))) for _ in range(512))
    equal = ((64, 512), (64, 4096), (16, 32768))
    return MappingProxyType(
        {
            **{f"{count} x {length}": (length,) * count for count, length in equal if length <= longest},
            "512 lognormal": tuple(min(longest, max(16, min(32768, length))) for length in drawn),
        }
    )


def mix_waste(pooled: Pooled, lengths: Sequence[int]) -> float:
    """Share, 0 to 1, of the memory that requests of ``lengths`` tokens take and that holds nothing.

    Whole blocks and state pages count, with every byte of them that no other request can use.
    """
    holding, shape = pooled.holding, pooled.shape
    states = blocks = needed = 0
    for length, count in Counter(lengths).items():
        own_states, own_blocks = holding.request_need(pooled.groups, length)
        states, blocks = states + count * own_states, blocks + count * own_blocks
        needed += count * sum(_needed(pooled.groups, holding, length))
    taken = shape.blocks(states, blocks) * shape.block_bytes
    return 1 - needed / taken if taken else 0.0


def requests_dict(pooled: Pooled, max_model_len: int) -> dict[str, object]:
    """JSON-ready: what requests of :data:`LENGTHS` tokens take, and what :func:`request_mixes` waste, in percent."""
    return {
        "memory": [request_memory(pooled, length).to_dict() for length in LENGTHS if length <= max_model_len],
        "mix_waste_pct": {
            name: round(100 * mix_waste(pooled, mix), 4) for name, mix in request_mixes(max_model_len).items()
        },
    }


def _bytes_per_token(group: LayerGroup) -> int:
    """Of all layers of an attention group; 0 for states, which do not grow."""
    return sum(layer.spec.bytes_per_token for layer in group.layers if isinstance(layer.spec, AttentionSpec))


def _needed(groups: Sequence[LayerGroup], holding: Holding, tokens: int) -> tuple[int, int]:
    """Bytes of K and V, and of states, without any rounding."""
    kv = sum(holding.kept_tokens(group, tokens) * _bytes_per_token(group) for group in groups)
    state = sum(holding.group_blocks(group, tokens) * _state_bytes(group) for group in groups if group.is_state)
    return kv, state


def _state_bytes(group: LayerGroup) -> int:
    """Of all layers of a group of states, raw."""
    return sum(layer.spec.state_bytes for layer in group.layers if isinstance(layer.spec, MambaSpec))
