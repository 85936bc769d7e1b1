"""Each running request's place on the device for the token it sampled last, which its next step starts from."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ....errors import IntegrityError
from ..requests import Request


class Seats:
    """``max_num_seqs`` places, and one more that rows without a request may write to.

    :param max_num_seqs: requests that run at the same time.
    """

    def __init__(self, max_num_seqs: int, device: torch.device) -> None:
        self.last_tokens = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=device)
        self.spare = max_num_seqs
        self._taken: dict[Request, int] = {}
        self._free = list(range(max_num_seqs - 1, -1, -1))

    def of(self, requests: Sequence[Request]) -> list[int]:
        """The place of each of ``requests``; those of requests that have given their blocks back are free again.

        Steps run in order on the device, so that a place's new owner writes after the old one has read.
        """
        for request in [request for request in self._taken if not request.tables]:
            self._free.append(self._taken.pop(request))
        for request in requests:
            if request not in self._taken:
                if not self._free:
                    raise IntegrityError(f"{request.id} has no place: {len(self._taken)} requests run already")
                self._taken[request] = self._free.pop()
        return [self._taken[request] for request in requests]
