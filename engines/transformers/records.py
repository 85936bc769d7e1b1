"""What the engine takes and gives: the startup's result, sampling settings, outputs. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from ...cache.specs import LayerGroup
from ...config import EngineConfig
from ...device import DeviceFacts
from ...errors import RequestError

if TYPE_CHECKING:
    from ...attention_backends.interface import AttentionImpl
    from ...cache.allocation import KVCache
    from ...hybrid.mixers.interface import MixerKernels

FinishReason = Literal["stop", "length", "abort"]

MIN_TEMPERATURE = 1e-6
"""Below it logits divided by the temperature may leave the range of numbers."""


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
        heat, share, stops = self.temperature, self.top_p, self.stop_token_ids
        warm = _is_number(heat) and math.isfinite(heat) and (heat == 0 or heat >= MIN_TEMPERATURE)
        checks: tuple[tuple[str, bool, str], ...] = (
            ("max_new_tokens", _is_whole(self.max_new_tokens, 1), "a whole number above zero"),
            ("temperature", warm, f"0, or a finite number from {MIN_TEMPERATURE}"),
            ("top_k", _is_whole(self.top_k, 0), "a whole number from 0, where 0 takes all"),
            ("top_p", _is_number(share) and 0 < share <= 1, "a number above 0 and up to 1"),
            ("seed", self.seed is None or _is_whole(self.seed, 0, 2**63), "a whole number from 0 to 2**63 - 1"),
            ("stop_token_ids", isinstance(stops, (tuple, list)) and all(_is_whole(t, 0) for t in stops), "token ids"),
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
    def mixers(self) -> MixerKernels | None:
        """The kernels of state layers; None for a model that has none."""

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
    def device(self) -> DeviceFacts:
        """The device of the cache."""

    @property
    def max_model_len(self) -> int:
        """Longest sequence, prompt and output together, in tokens."""

    @property
    def cleared_groups(self) -> frozenset[int]:
        """Attention groups whose backend reads unwritten slots, so that blocks are cleared at hand-out."""


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: object, least: int, end: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < end
