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
class PoolShape:
    """How states and attention share one pool of equal blocks.

    One of ``state_page_blocks`` and ``states_per_block`` is 1. Both are where a state takes a block like any other
    (unified pages).
    """

    block_bytes: int
    """Bytes of one block."""
    state_page_blocks: int = 1
    """Blocks that one state takes; they start at a multiple of this number."""
    states_per_block: int = 1
    """States that share one block."""

    @property
    def state_page_bytes(self) -> int:
        """Bytes that one state takes from the pool."""
        return self.block_bytes * self.state_page_blocks // self.states_per_block

    def blocks(self, states: int, blocks: int) -> int:
        """Blocks that ``states`` states and ``blocks`` blocks of attention take away from others."""
        return -(-states // self.states_per_block) * self.state_page_blocks + blocks

    def num_state_pages(self, num_blocks: int) -> int:
        """Whole state pages in a pool, the first, which holds the null block, included."""
        return num_blocks // self.state_page_blocks

    def fits(self, num_blocks: int, states: int, blocks: int) -> bool:
        """Whether an empty pool holds that many at the same time.

        The rest of the null block's state page, and what is left over at the end, serve attention only.
        """
        pages = -(-states // self.states_per_block)
        enough_pages = pages == 0 or pages < self.num_state_pages(num_blocks)
        return enough_pages and self.blocks(states, blocks) + NULL_BLOCKS <= num_blocks

    def least_blocks(self, states: int, blocks: int) -> int:
        """Blocks of the smallest pool that holds that many at the same time, the null block included."""
        pages = -(-states // self.states_per_block)
        whole = (pages + 1) * self.state_page_blocks if pages else 0
        return max(whole, self.blocks(states, blocks) + NULL_BLOCKS)


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
    retained: int = 0
    """Tokens below a sliding window whose blocks are kept as well, where others go back."""
    draft_states: int = 0
    """States that a request keeps on top, one per draft token that is being verified."""

    def group_blocks(self, group: LayerGroup, num_tokens: int) -> int:
        """Blocks of ``group`` that a request of ``num_tokens`` tokens holds."""
        blocks = -(-num_tokens // group.block_size)
        if group.is_state:
            return self.draft_states + (blocks if self.mamba_cache_mode == "all" else 1)
        spec = group.layers[0].spec
        if self.frees_out_of_window and isinstance(spec, AttentionSpec) and spec.sliding_window is not None:
            covered = spec.sliding_window - 1 + self.retained + self.in_flight
            return min(blocks, -(-covered // group.block_size) + 1)
        return blocks

    def kept_tokens(self, group: LayerGroup, num_tokens: int) -> int:
        """Tokens of a request of ``num_tokens`` whose K and V an attention group still needs."""
        spec = group.layers[0].spec
        if self.frees_out_of_window and isinstance(spec, AttentionSpec) and spec.sliding_window is not None:
            return min(num_tokens, spec.sliding_window)
        return num_tokens

    def request_blocks(self, groups: Sequence[LayerGroup], num_tokens: int) -> int:
        """Ids of all groups that a request of ``num_tokens`` tokens holds."""
        return sum(self.request_need(groups, num_tokens))

    def request_need(self, groups: Sequence[LayerGroup], num_tokens: int) -> tuple[int, int]:
        """States, and blocks of attention, that a request of ``num_tokens`` tokens holds."""
        states = sum(self.group_blocks(group, num_tokens) for group in groups if group.is_state)
        blocks = sum(self.group_blocks(group, num_tokens) for group in groups if not group.is_state)
        return states, blocks

    def request_bytes(self, groups: Sequence[LayerGroup], shape: PoolShape, num_tokens: int) -> int:
        """Memory of a pool, in bytes, in which one request of ``num_tokens`` tokens fits."""
        return shape.least_blocks(*self.request_need(groups, num_tokens)) * shape.block_bytes


def useful_blocks(
    groups: Sequence[LayerGroup], shape: PoolShape, max_model_len: int, max_num_seqs: int, holding: Holding
) -> int:
    """Blocks that ``max_num_seqs`` requests of ``max_model_len`` tokens hold, and the null block: never more."""
    states, blocks = holding.request_need(groups, max_model_len)
    return shape.least_blocks(max_num_seqs * states, max_num_seqs * blocks)


def plan_capacity(
    groups: Sequence[LayerGroup],
    shape: PoolShape,
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
        option, budget, total = "memory_bytes", memory_bytes, memory_bytes // shape.block_bytes
        said = f"{format_bytes(budget)} of cache memory"
    else:
        option, budget, total = "num_blocks", num_blocks * shape.block_bytes, num_blocks
        said = f"num_blocks {num_blocks}"
    needs = {n: holding.request_need(groups, n) for n in {1, *lengths}}
    if not shape.fits(total, *needs[1]):
        blocks = shape.least_blocks(*needs[1])
        raise CapacityError(
            f"{said} cannot hold one request: {_needs_words(groups, shape, holding)} and one block is the null block, "
            f"so at least {blocks} blocks or {format_bytes(blocks * shape.block_bytes)} ({blocks * shape.block_bytes} "
            "bytes) are needed",
            option=option,
            value=memory_bytes if num_blocks is None else num_blocks,
            expected=blocks * shape.block_bytes if num_blocks is None else blocks,
        )
    return Capacity(
        memory_bytes=budget,
        num_blocks=total,
        max_tokens=_largest(lambda n: shape.fits(total, *holding.request_need(groups, n)), 1, max_model_len),
        floor_bytes_per_request=_bytes_taken(shape, *needs[1]),
        concurrency=MappingProxyType({n: _at_one_time(shape, total, *needs[n]) for n in lengths}),
    )


def _at_one_time(shape: PoolShape, num_blocks: int, states: int, blocks: int) -> int:
    """Requests of equal need that a pool of ``num_blocks`` holds."""
    most = num_blocks // max(1, blocks) if blocks else num_blocks * shape.states_per_block // max(1, states)
    return _largest(lambda count: shape.fits(num_blocks, count * states, count * blocks), 0, most)


def _bytes_taken(shape: PoolShape, states: int, blocks: int) -> int:
    return states * shape.state_page_bytes + blocks * shape.block_bytes


def _needs_words(groups: Sequence[LayerGroup], shape: PoolShape, holding: Holding) -> str:
    block, drafts = format_bytes(shape.block_bytes), holding.draft_states
    attention = sum(not group.is_state for group in groups)
    if shape.state_page_blocks == 1:
        states = len(groups) - attention
        more = f", {states} groups of states {drafts} more for draft tokens," if drafts and states else ""
        return f"{len(groups)} layer groups need a block of {block} each{more}"
    return (
        f"{attention} groups of attention layers need a block of {block} each, a state needs "
        f"{shape.state_page_blocks} blocks"
    )


def _largest(fits: Callable[[int], bool], least: int, limit: int) -> int:
    """The largest number up to ``limit`` that fits; ``least`` does, and a larger number never needs less."""
    low, high = least, limit
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
