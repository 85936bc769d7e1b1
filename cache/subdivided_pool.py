"""Two levels in one pool: state pages, and the blocks that they are carved into (or the shares that a block is)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from ..errors import ConfigError, IntegrityError
from .capacity import PoolShape
from .free_queue import CarvedPages
from .pool import BlockPool


class SubdividedPool:
    """Hands out state pages to state groups and blocks to attention groups, from the same memory.

    The larger of the two is the *page*: a state page of several blocks, or a block that several states share. Whoever
    needs the smaller one carves a page; any request may have the other parts of it. Page 0 holds the null block: the
    rest of it, and the blocks behind the last whole state page, serve attention only.

    :param shape: blocks per state page, or states per block.
    :param num_blocks: blocks in the buffer, the null block included.
    :param state_groups: indices of the groups that keep states.
    :raises ConfigError: for a pool that has no state page beside the null block's.
    """

    def __init__(self, shape: PoolShape, num_blocks: int, state_groups: frozenset[int]) -> None:
        pages = shape.num_state_pages(num_blocks)
        if pages < 2:
            least = shape.least_blocks(1, 0)
            raise ConfigError(
                f"num_blocks {num_blocks} hold no state beside the null block: a state takes "
                f"{shape.state_page_blocks} blocks",
                option="num_blocks",
                value=num_blocks,
                expected=f">= {least}",
            )
        self.shape = shape
        self.num_blocks = num_blocks
        self._state_groups = state_groups
        self._num_pages = pages
        self._whole = OrderedDict.fromkeys(range(1, pages))
        per_page, per_block = shape.state_page_blocks, shape.states_per_block
        leftover = [range(1, per_page), range(pages * per_page, num_blocks)]
        self._block_queue = CarvedPages(self._whole, per_page, leftover, self._forget_states)
        self._state_queue = CarvedPages(self._whole, per_block, on_carve=self._forget_blocks)
        self.attention = BlockPool(num_blocks, free=self._block_queue)
        """Books of the blocks of attention groups."""
        self.states = BlockPool(pages * per_block, free=self._state_queue, first=per_block, noun="state")
        """Books of the states."""

    @property
    def capacity(self) -> int:
        """Blocks of an empty pool, without the null block."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, not even in part."""
        return len(self._block_queue)

    @property
    def num_whole_pages(self) -> int:
        """Pages that are free as a whole: the next states' or, carved, attention's."""
        return len(self._whole)

    @property
    def num_free_in_carved_pages(self) -> int:
        """Blocks that nobody holds and that no state can take, since others hold parts of their page."""
        return self._block_queue.num_open - self._block_queue.num_kept

    def blocks(self, need: Mapping[int, int]) -> int:
        """Blocks of the pool that ``need`` takes away from others, if no page is open yet."""
        return self.shape.blocks(*self._sides(need))

    def fits(self, need: Mapping[int, int]) -> bool:
        """Whether the empty pool could serve ``need``."""
        return self.shape.fits(self.num_blocks, *self._sides(need))

    def can_allocate(self, need: Mapping[int, int]) -> bool:
        """Whether all of ``need`` can be handed out now, in any order."""
        states, blocks = self._sides(need)
        pages = _pages(states - self._state_queue.num_open, self.shape.states_per_block)
        pages += _pages(blocks - self._block_queue.num_open, self.shape.state_page_blocks)
        return pages <= len(self._whole)

    def allocate(self, group: int, count: int, owner: str) -> list[int]:
        """Hand ``count`` states or blocks to ``owner``, from pages that are open already where there are any.

        :raises CapacityError: when that many are not free; nothing changes then.
        """
        return self._books(group).allocate(count, owner)

    def free(self, group: int, block_ids: Sequence[int], owner: str) -> None:
        """End ``owner``'s hold; a page of which nobody holds a part any more is whole again.

        :raises IntegrityError: for a double or foreign free, or an id that is none.
        """
        self._books(group).free(block_ids, owner)

    def owners(self, group: int, block_id: int) -> tuple[str, ...]:
        """Who holds ``block_id`` of ``group``.

        :raises IntegrityError: for an id that is none.
        """
        return self._books(group).owners(block_id)

    def check_integrity(self) -> None:
        """Recount everything.

        :raises IntegrityError: if a page is lost, serves states and attention at once, or a book does not balance.
        """
        blocks, states, whole = self._block_queue.carved, self._state_queue.carved, self._whole.keys()
        for page in range(1, self._num_pages):
            uses = [page in blocks, page in states, page in whole]
            if uses.count(True) != 1:
                said = [name for name, used in zip(("attention's", "states'", "free"), uses, strict=True) if used]
                raise IntegrityError(f"page {page} is {' and '.join(said) or 'lost'}", option="page", value=page)
        if 0 in states or 0 in whole:
            raise IntegrityError("page 0 holds the null block and was given away", option="page", value=0)
        self.attention.check_integrity()
        self.states.check_integrity()

    def _books(self, group: int) -> BlockPool:
        return self.states if group in self._state_groups else self.attention

    def _sides(self, need: Mapping[int, int]) -> tuple[int, int]:
        """States and blocks."""
        states = sum(count for group, count in need.items() if group in self._state_groups)
        return states, sum(need.values()) - states

    def _forget_states(self, page: int) -> None:
        first = page * self.shape.states_per_block
        self.states.overwrite(range(first, first + self.shape.states_per_block))

    def _forget_blocks(self, page: int) -> None:
        first = page * self.shape.state_page_blocks
        self.attention.overwrite(range(first, first + self.shape.state_page_blocks))


def _pages(missing: int, parts: int) -> int:
    """Whole pages to carve for ``missing`` more parts."""
    return -(-max(0, missing) // parts)
