"""What the engine takes and gives: the startup's result, sampling settings, outputs. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from ...cache.specs import LayerGroup
from ...config import EngineConfig
from ...errors import RequestError

if TYPE_CHECKING:
    from ...attention_backends.interface import AttentionImpl
    from ...cache.allocation import KVCache

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when a request ends."""

    max_new_tokens: int = 64
    """Tokens to generate at most."""
    temperature: float = 0.0
    """0 takes the most likely token; above it, tokens are drawn from softmax(logits / temperature)."""
    top_k: int = 0
    """Draw from the ``top_k`` most likely tokens; 0 takes all."""
    top_p: float = 1.0
    """Draw from the smallest set of likely tokens whose probabilities reach ``top_p``."""
    seed: int | None = None
    """The same seed gives the same tokens, whatever else runs; ``None`` derives one from the engine's seed."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the request, beside the model's end of sequence."""
    ignore_eos: bool = False
    """Go on after the model's end of sequence."""

    def validated(self) -> SamplingParams:
        """These settings, once every value is one that sampling can take.

        :raises RequestError: naming the setting, its value and the right range.
        """
        checks: tuple[tuple[str, bool, str], ...] = (
            ("max_new_tokens", self.max_new_tokens >= 1, "a whole number above zero"),
            ("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "a finite number from 0"),
            ("top_k", self.top_k >= 0, "a whole number from 0, where 0 takes all"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0 and up to 1"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "a whole number from 0 to 2**63 - 1"),
        )
        for name, right, expected in checks:
            value = getattr(self, name)
            if not right:
                raise RequestError(
                    f"{name} {value!r} cannot be used; give {expected}",
                    option=name, value=value, expected=expected,
                )  # fmt: skip
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What one step made of one request."""

    request_id: str
    new_token_ids: tuple[int, ...]
    """Tokens of this step; empty where an aborted request says goodbye."""
    text: str
    """Text that became certain with this step; a character split over tokens waits for its last one."""
    finished: bool
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A finished request."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """Generated tokens, the one that ended the request included."""
    text: str
    finish_reason: FinishReason
    num_preemptions: int
    """How often its blocks were taken away and its tokens computed again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far ``generate`` has come."""

    finished: int
    """Requests that are done."""
    total: int
    """Requests of this call."""
    tokens: int
    """Tokens generated so far."""


class Ready(Protocol):
    """What ``makeready.prepare`` hands to an engine; any object with these attributes will do."""

    @property
    def cache(self) -> KVCache:
        """The allocated cache."""

    @property
    def attention(self) -> Mapping[int, AttentionImpl]:
        """The built backend of each attention layer, by the model's layer index."""

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        """Layer groups, each with block tables of its own."""

    @property
    def block_size(self) -> int:
        """Tokens of a block of an attention group."""

    @property
    def config(self) -> EngineConfig:
        """The settings of this run."""

    @property
    def max_model_len(self) -> int:
        """Longest sequence, prompt and output together, in tokens."""

    @property
    def cleared_groups(self) -> frozenset[int]:
        """Attention groups whose backend reads unwritten slots, so that blocks are cleared at hand-out."""
