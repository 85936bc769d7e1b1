"""What the engine keeps of a request while it lives. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...cache.block_table import BlockTable
from .records import SamplingParams


@dataclass(eq=False, slots=True, kw_only=True)
class Request:
    """The engine's own record of a request; only the scheduler and the engine change it."""

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    arrival: int
    """Place in the order of arrival."""
    output: list[int] = field(default_factory=list)
    num_pending: int = 0
    """Tokens that the device has sampled, or will have, and the host has not read."""
    num_computed: int = 0
    """Tokens whose K, V and states are in the cache."""
    prefill_len: int = 0
    """Tokens that are computed in prefill chunks since the last admission; all later ones in decode steps."""
    tables: dict[int, BlockTable] = field(default_factory=dict)
    """Block table of each group, by the group's index; empty while the request waits."""
    num_preemptions: int = 0

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far, with what is pending."""
        return len(self.prompt) + len(self.output) + self.num_pending

    @property
    def max_cached_tokens(self) -> int:
        """Tokens in the cache at the end; the last generated token is never written."""
        return len(self.prompt) + self.params.max_new_tokens - 1

    @property
    def is_prefill(self) -> bool:
        """True while prefill chunks remain."""
        return self.num_computed < self.prefill_len

    @property
    def awaits_last(self) -> bool:
        """True if no further token is to be computed: the last one is pending."""
        return self.num_pending > 0 and len(self.output) + self.num_pending >= self.params.max_new_tokens

    @property
    def samples_next(self) -> bool:
        """True if all known tokens are computed, so that the last logits choose a new one."""
        return self.num_computed == self.num_tokens

    def tokens(self, start: int, end: int) -> tuple[int, ...]:
        """Token ids from ``start`` up to ``end`` of prompt and output together."""
        split = len(self.prompt)
        head = self.prompt[start:end]
        return head + tuple(self.output[max(start - split, 0) : max(end - split, 0)])
