"""Whose state a block holds, and after which token: checked before each forward, so that a stale one is never used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...errors import IntegrityError
from .requests import Request


class StateLedger:
    """One entry per state block: its owner, and how many of the owner's tokens are in the state.

    A forward changes states in place. Their entries are gone while it runs and come back, with its tokens, when it
    has ended well: what a failed forward leaves behind cannot be continued.
    """

    def __init__(self) -> None:
        self._valid: dict[int, tuple[str, int]] = {}

    def begin(self, requests: Sequence[Request], blocks: Mapping[int, Sequence[int]]) -> None:
        """Check the states that a forward starts from.

        :param blocks: per state group the block of each request.
        :raises IntegrityError: for a state of another request, or of another number of tokens.
        """
        for group, ids in blocks.items():
            for request, block in zip(requests, ids, strict=True):
                found = self._valid.pop(block, None)
                if request.num_computed and found != (request.id, request.num_computed):
                    held = "no valid state" if found is None else f"the state of {found[0]} after {found[1]} tokens"
                    raise IntegrityError(
                        f"{request.id} continues after {request.num_computed} tokens, and block {block} of group"
                        f" {group} holds {held}",
                        value=found,
                        expected=(request.id, request.num_computed),
                    )

    def commit(self, requests: Sequence[Request], blocks: Mapping[int, Sequence[int]], lengths: Sequence[int]) -> None:
        """Note that a forward of ``lengths`` tokens has ended well, or is queued behind all that was queued before."""
        for ids in blocks.values():
            for request, block, length in zip(requests, ids, lengths, strict=True):
                self._valid[block] = (request.id, request.num_computed + length)
