"""A step that the device works on: its tokens reach the host later."""

from __future__ import annotations

import torch

from ..requests import Request


class Flight:
    """Tokens of the requests that sampled in one step, on their way to the host.

    :param requests: those that sampled, in order.
    :param logits: (S, V), valid until the next step is launched.
    :param tokens: (S,) int64, the most likely ones; their copy to the host is queued here, behind the step.
    """

    def __init__(self, requests: tuple[Request, ...], logits: torch.Tensor, tokens: torch.Tensor) -> None:
        self.requests, self.logits = requests, logits
        self._host, self._arrived = tokens, None
        if tokens.device.type == "cuda":
            self._host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._host.copy_(tokens, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def read(self) -> list[int]:
        """The tokens; waits for the step."""
        if self._arrived is not None:
            self._arrived.synchronize()
        tokens: list[int] = self._host.tolist()
        return tokens
