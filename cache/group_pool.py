"""Blocks by group: what a scheduler asks of a pool, whatever the page strategy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from .capacity import PoolShape
from .layout import Layout
from .pool import BlockPool
from .specs import LayerGroup
from .subdivided_pool import SubdividedPool


class GroupPool(Protocol):
    """Hands out block ids to the groups of a cache. ``need`` maps a group's index to a number of blocks."""

    @property
    def capacity(self) -> int:
        """Blocks of an empty pool, without the null block."""

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""

    def blocks(self, need: Mapping[int, int]) -> int:
        """Blocks of the pool that ``need`` takes away from others."""

    def fits(self, need: Mapping[int, int]) -> bool:
        """Whether the empty pool could serve ``need``."""

    def can_allocate(self, need: Mapping[int, int]) -> bool:
        """Whether all of ``need`` can be handed out now."""

    def allocate(self, group: int, count: int, owner: str) -> list[int]:
        """Hand ``count`` ids of ``group`` to ``owner``.

        :raises CapacityError: when that many are not free; nothing changes then.
        """

    def free(self, group: int, block_ids: Sequence[int], owner: str) -> None:
        """End ``owner``'s hold on ids of ``group``.

        :raises IntegrityError: for a double or foreign free, or an id that is none.
        """

    def owners(self, group: int, block_id: int) -> tuple[str, ...]:
        """Who holds ``block_id`` of ``group``."""

    def check_integrity(self) -> None:
        """Recount everything.

        :raises IntegrityError: if something is lost or handed out twice.
        """


class UnifiedPool:
    """A block is a block, whichever group has it.

    :param num_blocks: blocks in the buffer, the null block included.
    :raises ConfigError: for fewer than two blocks.
    """

    def __init__(self, num_blocks: int) -> None:
        self.books = BlockPool(num_blocks)

    @property
    def capacity(self) -> int:
        """Blocks of an empty pool, without the null block."""
        return self.books.capacity

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return self.books.num_free

    def blocks(self, need: Mapping[int, int]) -> int:
        """All that is needed together."""
        return sum(need.values())

    def fits(self, need: Mapping[int, int]) -> bool:
        """Whether the empty pool could serve ``need``."""
        return self.blocks(need) <= self.capacity

    def can_allocate(self, need: Mapping[int, int]) -> bool:
        """Whether all of ``need`` can be handed out now."""
        return self.books.can_allocate(self.blocks(need))

    def allocate(self, group: int, count: int, owner: str) -> list[int]:
        """Hand ``count`` blocks to ``owner``; see :meth:`BlockPool.allocate`."""
        return self.books.allocate(count, owner)

    def free(self, group: int, block_ids: Sequence[int], owner: str) -> None:
        """End ``owner``'s hold on blocks; see :meth:`BlockPool.free`."""
        self.books.free(block_ids, owner)

    def owners(self, group: int, block_id: int) -> tuple[str, ...]:
        """Who holds ``block_id``."""
        return self.books.owners(block_id)

    def check_integrity(self) -> None:
        """Recount everything; see :meth:`BlockPool.check_integrity`."""
        self.books.check_integrity()


def make_pool(groups: Iterable[LayerGroup], shape: PoolShape, num_blocks: int) -> GroupPool:
    """The pool for ``num_blocks`` blocks of ``shape``, without a buffer."""
    if shape.state_page_blocks == shape.states_per_block == 1:
        return UnifiedPool(num_blocks)
    states = frozenset(group.index for group in groups if group.is_state)
    return SubdividedPool(shape, num_blocks, states)


def pool_for(layout: Layout) -> GroupPool:
    """The pool for the blocks of ``layout``."""
    return make_pool(layout.groups, layout.shape, layout.num_blocks)
