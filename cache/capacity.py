"""How many blocks a budget gives, what a request needs, and how many requests run at once. Whole numbers only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from ..device import format_bytes
from ..errors import CapacityError
from .specs import AttentionSpec, LayerGroup

NULL_BLOCKS = 1
"""Block 0 pads block tables and is never handed out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What a memory budget gives."""

    memory_bytes: int
    """The budget, in bytes."""
    num_blocks: int
    """Blocks of the pool, the null block included."""
    max_tokens: int
    """The longest single request that fits."""
    floor_bytes_per_request: int
    """Bytes that the shortest request takes away from others: one block of every group."""
    concurrency: Mapping[int, int]
    """Requests that fit at the same time, per length in tokens."""

    def to_dict(self) -> dict[str, object]:
        """JSON-ready values; lengths become text."""
        return {
            "memory_bytes": self.memory_bytes,
            "num_blocks": self.num_blocks,
            "max_tokens": self.max_tokens,
            "floor_bytes_per_request": self.floor_bytes_per_request,
            "concurrency": {str(length): count for length, count in self.concurrency.items()},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """How long an engine keeps blocks of a live request."""

    mamba_cache_mode: str = "none"
    """``none`` and ``align``: one state per request (steady state); ``all``: one per kept state."""
    frees_out_of_window: bool = False
    """True if blocks that have left a sliding window go back to the pool while the request runs."""
    in_flight: int = 0
    """Tokens that one step may add, in tokens."""

    def group_blocks(self, group: LayerGroup, num_tokens: int) -> int:
        """Blocks of ``group`` that a request of ``num_tokens`` tokens holds."""
        blocks = -(-num_tokens // group.block_size)
        if group.is_state:
            return blocks if self.mamba_cache_mode == "all" else 1
        spec = group.layers[0].spec
        if self.frees_out_of_window and isinstance(spec, AttentionSpec) and spec.sliding_window is not None:
            covered = spec.sliding_window - 1 + self.in_flight
            return min(blocks, -(-covered // group.block_size) + 1)
        return blocks

    def request_blocks(self, groups: Sequence[LayerGroup], num_tokens: int) -> int:
        """Blocks of all groups that a request of ``num_tokens`` tokens holds."""
        return sum(self.group_blocks(group, num_tokens) for group in groups)

    def request_bytes(self, groups: Sequence[LayerGroup], bytes_per_block: int, num_tokens: int) -> int:
        """Memory of a pool, in bytes, in which one request of ``num_tokens`` tokens fits."""
        return (self.request_blocks(groups, num_tokens) + NULL_BLOCKS) * bytes_per_block


def useful_blocks(groups: Sequence[LayerGroup], max_model_len: int, max_num_seqs: int) -> int:
    """Blocks that ``max_num_seqs`` requests of ``max_model_len`` tokens hold, and the null block: never more."""
    return max_num_seqs * Holding().request_blocks(groups, max_model_len) + NULL_BLOCKS


def plan_capacity(
    groups: Sequence[LayerGroup],
    bytes_per_block: int,
    *,
    memory_bytes: int | None = None,
    num_blocks: int | None = None,
    lengths: Sequence[int],
    max_model_len: int,
    holding: Holding,
) -> Capacity:
    """What ``memory_bytes`` give, or ``num_blocks`` blocks where the user fixed them; one of the two is needed.

    :param lengths: request lengths, in tokens, to count concurrency for.
    :raises CapacityError: if not even one token of one request fits.
    """
    if num_blocks is None:
        if memory_bytes is None:
            raise CapacityError(
                "neither memory_bytes nor num_blocks is known; give one", option="memory_bytes", expected="a size"
            )
        option, budget, total = "memory_bytes", memory_bytes, memory_bytes // bytes_per_block
        said = f"{format_bytes(budget)} of cache memory"
    else:
        option, budget, total = "num_blocks", num_blocks * bytes_per_block, num_blocks
        said = f"num_blocks {num_blocks}"
    least = holding.request_blocks(groups, 1)
    if total - NULL_BLOCKS < least:
        blocks = least + NULL_BLOCKS
        raise CapacityError(
            f"{said} cannot hold one request: {len(groups)} layer groups need a block of "
            f"{format_bytes(bytes_per_block)} each and one block is the null block, so at least {blocks} blocks or "
            f"{format_bytes(blocks * bytes_per_block)} ({blocks * bytes_per_block} bytes) are needed",
            option=option,
            value=memory_bytes if num_blocks is None else num_blocks,
            expected=blocks * bytes_per_block if num_blocks is None else blocks,
        )
    usable = total - NULL_BLOCKS
    return Capacity(
        memory_bytes=budget,
        num_blocks=total,
        max_tokens=_longest(lambda n: holding.request_blocks(groups, n) <= usable, max_model_len),
        floor_bytes_per_request=least * bytes_per_block,
        concurrency=MappingProxyType({n: usable // holding.request_blocks(groups, n) for n in lengths}),
    )


def _longest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest length up to ``limit`` that fits; one token does, and a longer request never needs less."""
    low, high = 1, limit
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
