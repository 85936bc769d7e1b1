"""Which blocks a request has, in order, and where its tokens lie: host-side lists, and tensors of a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import ConfigError, IntegrityError
from .layout import NULL_BLOCK
from .staging import stage


class BlockTable:
    """The blocks of one request in one group.

    Token ``t`` lies in block ``blocks[t // block_size]`` at offset ``t % block_size``. Entries of blocks that
    were given back early (a sliding window has passed them) are the null block; later tokens keep theirs.

    :param block_size: tokens of a block.
    :raises ConfigError: for a ``block_size`` below 1.
    """

    __slots__ = ("_held", "block_size", "blocks")

    def __init__(self, block_size: int) -> None:
        if block_size < 1:
            raise ConfigError(
                f"block_size {block_size} holds no token",
                option="block_size",
                value=block_size,
                expected=">= 1",
            )
        self.block_size = block_size
        self.blocks: list[int] = []
        self._held: set[int] = set()

    @property
    def num_tokens(self) -> int:
        """Tokens that the blocks have room for, counted from the request's first token."""
        return len(self.blocks) * self.block_size

    def append(self, block_ids: Sequence[int]) -> None:
        """Add ``block_ids`` after the blocks there are.

        :raises IntegrityError: for the null block, or a block that is there already.
        """
        for block_id in block_ids:
            if block_id == NULL_BLOCK:
                raise IntegrityError(f"block {NULL_BLOCK} is the null block and cannot hold tokens", value=block_id)
        if len(set(block_ids)) != len(block_ids) or not self._held.isdisjoint(block_ids):
            twice = next(b for i, b in enumerate(block_ids) if b in self._held or b in block_ids[:i])
            raise IntegrityError(f"block {twice} is in this block table already", value=twice)
        self._held.update(block_ids)
        self.blocks.extend(block_ids)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Count the blocks that are missing until there is room for ``num_tokens``, the first token's on."""
        return max(0, -(-num_tokens // self.block_size) - len(self.blocks))

    def slots(self, start: int, end: int) -> list[int]:
        """Find the slots of the tokens ``start`` to ``end - 1``: ``block_id * block_size + offset`` each.

        :raises IntegrityError: if a token has no block yet, or its block was given back.
        """
        if not 0 <= start <= end <= self.num_tokens:
            raise IntegrityError(
                f"tokens {start} to {end} are asked of a table with room for {self.num_tokens}",
                value=(start, end),
                expected=f"0 <= start <= end <= {self.num_tokens}",
            )
        slots: list[int] = []
        while start < end:
            index, offset = divmod(start, self.block_size)
            count = min(end - start, self.block_size - offset)
            if self.blocks[index] == NULL_BLOCK:
                raise IntegrityError(f"the block of token {start} was given back", value=start)
            first = self.blocks[index] * self.block_size + offset
            slots.extend(range(first, first + count))
            start += count
        return slots

    def release_before(self, token: int) -> list[int]:
        """Take out the blocks whose tokens all come before ``token``; the null block takes their places.

        :return: the block ids to free, in order; none that an earlier call returned.
        """
        passed = min(max(0, token) // self.block_size, len(self.blocks))
        released: list[int] = []
        # Walk back from the newest: what lies before a released block was released earlier.
        for index in range(passed - 1, -1, -1):
            if self.blocks[index] == NULL_BLOCK:
                break
            released.append(self.blocks[index])
            self._held.discard(self.blocks[index])
            self.blocks[index] = NULL_BLOCK
        return released[::-1]


def pad_tables(tables: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """The block tables of a step: int32 (B, longest); entries past a request's last block are block 0."""
    longest = max(map(len, tables), default=0)
    flat: list[int] = []
    for table in tables:
        flat.extend(table)
        flat.extend([NULL_BLOCK] * (longest - len(table)))
    return stage(flat, torch.int32, device).view(len(tables), longest)


def slot_mapping(
    tables: Sequence[BlockTable], starts: Sequence[int], lens: Sequence[int], device: torch.device
) -> torch.Tensor:
    """The slots of a step's tokens, request after request: int64 (sum of ``lens``,).

    :param starts: tokens of each request that are in the cache already.
    :param lens: tokens of each request in this step.
    :raises IntegrityError: if a token has no block.
    """
    slots: list[int] = []
    for table, start, count in zip(tables, starts, lens, strict=True):
        slots.extend(table.slots(start, start + count))
    return stage(slots, torch.int64, device)
