"""From logits to tokens. A request's draws depend on its seed and its own logits, never on the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .records import SamplingParams


class Sampler:
    """One request's way of choosing tokens, with its own stream of random numbers.

    :param params: validated settings.
    :param seed: used when the settings have none.
    """

    def __init__(self, params: SamplingParams, seed: int) -> None:
        self.params = params
        self._random = torch.Generator().manual_seed(seed if params.seed is None else params.seed)

    @property
    def is_greedy(self) -> bool:
        """True if the most likely token is taken."""
        return self.params.temperature == 0

    def draw(self, logits: torch.Tensor) -> int:
        """A token from ``logits`` (V,), on the host: one random number per token, whatever the settings."""
        probabilities, tokens = torch.softmax(logits.double() / self.params.temperature, dim=-1).sort(
            descending=True, stable=True
        )
        keep = self._kept(probabilities)
        cumulative = probabilities[:keep].cumsum(0)
        point = torch.rand((), generator=self._random, dtype=torch.float64) * cumulative[-1]
        return int(tokens[int(torch.searchsorted(cumulative, point, right=True).clamp(max=keep - 1))])

    def _kept(self, probabilities: torch.Tensor) -> int:
        """How many of the sorted ``probabilities`` may be drawn; at least one."""
        keep = len(probabilities)
        if self.params.top_k:
            keep = min(keep, self.params.top_k)
        if self.params.top_p < 1:
            cumulative = probabilities[:keep].cumsum(0)
            reached = torch.searchsorted(cumulative, self.params.top_p * cumulative[-1])
            keep = min(keep, int(reached) + 1)
        return keep


def choose(logits: torch.Tensor, likeliest: list[int], samplers: Sequence[tuple[int, Sampler]]) -> list[int]:
    """One token per row of ``logits`` (B, V): the likeliest, unless its sampler draws.

    :param samplers: rows that may draw, and how.
    """
    tokens = list(likeliest)
    drawn = [(row, sampler) for row, sampler in samplers if not sampler.is_greedy]
    if drawn:
        rows = logits[[row for row, _ in drawn]].float().cpu()
        for (row, sampler), distribution in zip(drawn, rows, strict=True):
            tokens[row] = sampler.draw(distribution)
    return tokens
