"""Who holds which block. Host-side books only; the bytes are ``allocation.KVCache``'s."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from ..errors import CapacityError, ConfigError, IntegrityError
from .free_queue import FreeQueue, LeastRecentlyUsed
from .layout import NULL_BLOCK


class BlockPool:
    """Hands out the blocks ``1 .. num_blocks - 1``; block 0 is the null block and belongs to nobody.

    So ``capacity`` is ``num_blocks - 1``. All groups draw on it. An owner (a request, say) holds
    a block at most once; several owners may share one. Free blocks are handed out least recently used first,
    and what a free block holds can be found by its key until then. Every call either does all that it was
    asked or raises and changes nothing. Not for use from several threads at once.

    :param num_blocks: blocks in the buffer, the null block included.
    :param free: the free blocks, where they are not each by itself.
    :param first: ids below this one belong to the null block.
    :param noun: what errors call a block.
    :raises ConfigError: for fewer than two blocks.
    """

    def __init__(
        self, num_blocks: int, *, free: FreeQueue | None = None, first: int = NULL_BLOCK + 1, noun: str = "block"
    ) -> None:
        if num_blocks < 2:
            raise ConfigError(
                f"num_blocks {num_blocks} leaves nothing to hand out: block {NULL_BLOCK} is the null block",
                option="num_blocks",
                value=num_blocks,
                expected=">= 2",
            )
        self.num_blocks = num_blocks
        self._first = first
        self._noun = noun
        self._free: FreeQueue = LeastRecentlyUsed(range(first, num_blocks)) if free is None else free
        self._owners: list[tuple[str, ...]] = [()] * num_blocks
        self._stamps = [0] * num_blocks
        self._block_of_key: dict[Hashable, int] = {}
        self._key_of_block: dict[int, Hashable] = {}

    @property
    def capacity(self) -> int:
        """Blocks that can be held at the same time: all but the null block."""
        return self.num_blocks - self._first

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, cached ones included."""
        return len(self._free)

    def can_allocate(self, count: int) -> bool:
        """Whether ``allocate(count, ...)`` would succeed now."""
        return 0 <= count <= self.num_free

    def allocate(self, count: int, owner: str) -> list[int]:
        """Hand ``count`` blocks to ``owner``, least recently used first; their keys are forgotten.

        :raises CapacityError: when fewer than ``count`` are free.
        :raises ConfigError: for a negative ``count``.
        """
        if count < 0:
            raise ConfigError(f"{owner!r} asked for {count} blocks", option="count", value=count, expected=">= 0")
        if count > self.num_free:
            raise CapacityError(
                f"{owner!r} asked for {count} blocks, and {self.num_free} of {self.capacity} are free",
                option="num_blocks",
                value=count,
                expected=f"<= {self.num_free}",
            )
        block_ids = self._free.take(count)
        self.overwrite(block_ids)
        held_by = (owner,)
        for block_id in block_ids:
            self._owners[block_id] = held_by
        return block_ids

    def touch(self, block_ids: Sequence[int], owner: str) -> None:
        """Let ``owner`` share ``block_ids``: held blocks, or cached free ones, which then are free no more.

        :raises IntegrityError: for a block that is free without a key, that ``owner`` holds, or that is none.
        """
        self._check_ids(block_ids, owner)
        for block_id in block_ids:
            if owner in self._owners[block_id]:
                raise self._fault(block_id, owner, "is touched by an owner that holds it already")
            if not self._owners[block_id] and block_id not in self._key_of_block:
                raise self._fault(block_id, owner, "is touched while it is free and holds nothing by any key")
        for block_id in block_ids:
            self._free.discard(block_id)
            self._owners[block_id] += (owner,)

    def free(self, block_ids: Sequence[int], owner: str) -> None:
        """End ``owner``'s hold on ``block_ids``; a block that nobody holds goes last into the free queue.

        The last of ``block_ids`` is reused last: give a prompt's last block first, and prefixes stay longest.

        :raises IntegrityError: for a double or foreign free, or an id that is no block.
        """
        self._check_ids(block_ids, owner)
        for block_id in block_ids:
            self.check_owner(block_id, owner)
        for block_id in block_ids:
            self._owners[block_id] = tuple(name for name in self._owners[block_id] if name != owner)
            if not self._owners[block_id]:
                self._free.add(block_id)

    def owners(self, block_id: int) -> tuple[str, ...]:
        """Who holds ``block_id``, in the order they came; empty when it is free.

        :raises IntegrityError: for an id that is no block.
        """
        self._check_ids((block_id,), "owners()")
        return self._owners[block_id]

    def check_owner(self, block_id: int, owner: str) -> None:
        """Raise unless ``owner`` holds ``block_id``.

        :raises IntegrityError: if it is free, held by others only, or no block.
        """
        held_by = self.owners(block_id)
        if not held_by:
            raise self._fault(block_id, owner, "is free already: a double free, or a use after free")
        if owner not in held_by:
            raise self._fault(block_id, owner, f"belongs to {', '.join(map(repr, held_by))}")

    def stamp(self, block_id: int) -> int:
        """How often ``block_id`` was handed out.

        Whoever remembers a block beside its stamp can tell later whether it was handed out again
        (:meth:`check_stamp`): a transfer, say, or a match that is used a step later.

        :raises IntegrityError: for an id that is no block.
        """
        self._check_ids((block_id,), "stamp()")
        return self._stamps[block_id]

    def check_stamp(self, block_id: int, stamp: int) -> None:
        """Raise if ``block_id`` was handed out again since ``stamp`` was taken.

        :raises IntegrityError: naming both stamps.
        """
        if self.stamp(block_id) != stamp:
            problem = f"has stamp {self._stamps[block_id]}, not {stamp}: it was handed out again"
            raise self._fault(block_id, "check_stamp()", problem)

    def cache_block(self, block_id: int, key: Hashable) -> int:
        """Make what ``block_id`` holds findable under ``key``. The first block under a key stays the one.

        :return: the block that ``key`` finds from now on; not ``block_id`` if another one was first.
        :raises IntegrityError: for a block that is free, that has another key, or that is none.
        """
        if not self.owners(block_id):
            raise self._fault(block_id, "cache_block()", f"is free, so {key!r} cannot be put in it")
        known = self._key_of_block.get(block_id, key)
        if known != key:
            raise self._fault(block_id, "cache_block()", f"holds {known!r} and cannot hold {key!r} as well")
        first = self._block_of_key.setdefault(key, block_id)
        if first == block_id:
            self._key_of_block[block_id] = key
        return first

    def lookup(self, key: Hashable) -> int | None:
        """Find the block under ``key``, held or free; :meth:`touch` it before the next :meth:`allocate`."""
        return self._block_of_key.get(key)

    def overwrite(self, block_ids: Sequence[int]) -> None:
        """Forget what free blocks held: their memory serves something else from now on."""
        for block_id in block_ids:
            self._stamps[block_id] += 1
        for block_id in block_ids if self._key_of_block else ():
            if block_id in self._key_of_block:
                del self._block_of_key[self._key_of_block.pop(block_id)]

    def check_integrity(self) -> None:
        """Recount everything.

        :raises IntegrityError: if a block is lost, handed out twice, or its key leads elsewhere.
        """
        for block_id, held_by in enumerate(self._owners):
            is_free, should_be = block_id in self._free, not held_by and block_id >= self._first
            if is_free != should_be and not (should_be and self._free.is_lent(block_id)):
                problem = "is in the free queue" if is_free else "is lost: not in the free queue"
                raise self._fault(block_id, ", ".join(held_by) or "nobody", problem)
            if len(set(held_by)) != len(held_by):
                raise self._fault(block_id, ", ".join(held_by), "is held twice by one owner")
        if self._owners[NULL_BLOCK] or NULL_BLOCK in self._key_of_block:
            raise self._fault(NULL_BLOCK, ", ".join(self._owners[NULL_BLOCK]), "is the null block")
        if set(self._free) - set(range(self._first, self.num_blocks)):
            raise IntegrityError("the free queue holds ids that are no blocks", value=self.num_free)
        if {block: key for key, block in self._block_of_key.items()} != self._key_of_block:
            raise IntegrityError("keys and blocks do not lead to each other", value=len(self._block_of_key))

    def _check_ids(self, block_ids: Sequence[int], owner: str) -> None:
        for block_id in block_ids:
            if 0 <= block_id < self._first:
                raise self._fault(block_id, owner, "is the null block, which nobody owns")
            if not 0 < block_id < self.num_blocks:
                there = f"{self._noun}s {self._first} to {self.num_blocks - 1}"
                raise self._fault(block_id, owner, f"is unknown: the pool has {there}")
        if len(set(block_ids)) != len(block_ids):
            twice = next(b for i, b in enumerate(block_ids) if b in block_ids[:i])
            raise self._fault(twice, owner, "is named twice in one call")

    def _fault(self, block_id: int, owner: str, problem: str) -> IntegrityError:
        return IntegrityError(f"{self._noun} {block_id} {problem} (by {owner!r})", option="block_id", value=block_id)
