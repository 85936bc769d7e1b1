"""What happens to the bytes of blocks that change hands."""

from __future__ import annotations

from .records import Ready
from .scheduler import Step


class BlockKeeper:
    """Clears blocks at hand-out where something reads before it writes.

    States unless kernels know which requests are fresh, and write the whole state of those: a request must never
    meet another one's. Attention blocks only for backends that touch the unwritten end of a block.

    :param clear_states: whether states are read before they are written.
    :param poison_freed: fill freed blocks with 0xFF, NaN in every float dtype.
    """

    def __init__(self, ready: Ready, *, clear_states: bool, poison_freed: bool) -> None:
        self._cache = ready.cache
        states = {group.index for group in ready.groups if group.is_state}
        self._cleared = ready.cleared_groups | (states if clear_states else set())
        self._poison_freed = poison_freed

    def apply(self, step: Step) -> None:
        """Do it for the blocks of ``step``, freed ones first: they may have been handed out again."""
        if self._poison_freed:
            for blocks in step.freed:
                self._cache.poison_blocks(blocks.group, blocks.ids)
        by_group: dict[int, list[int]] = {}
        for blocks in step.handed_out:
            if blocks.group in self._cleared:
                by_group.setdefault(blocks.group, []).extend(blocks.ids)
        for group, ids in by_group.items():
            self._cache.clear_blocks(group, ids)
