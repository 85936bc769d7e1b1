"""Runs the model: one forward for the decode batch, one for each prefill chunk. The model's code is untouched."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ...cache.staging import stage
from ...errors import ConfigError, IntegrityError
from .advice import without_kernel_advice
from .attention import CONTEXT, NAME, PACKED_NAME, register
from .binding import bind
from .families import Traits
from .forward_step import ForwardStep, build_step
from .ledger import StateLedger
from .mamba1 import initial_states, scan_module
from .paged_cache import PagedCache
from .records import Ready
from .requests import Request


class ModelRunner:
    """A model whose attention and states live in the paged cache.

    From construction to :meth:`close` the model calls makeready's attention, so it cannot be used elsewhere.

    :raises UnsupportedModelError: if this transformers lacks an entry point that the family needs.
    """

    def __init__(self, model: Any, ready: Ready, traits: Traits) -> None:
        self._model = model
        self._traits = traits
        self._scan_module = scan_module(model, traits)
        self._binding = bind(ready, model.config.get_text_config(decoder=True).num_hidden_layers)
        self._ledger = StateLedger()
        self._device = model.device
        self._stock_attention = model.config._attn_implementation
        register()
        model.set_attn_implementation(NAME)

    def close(self) -> None:
        """Give the model its own attention back."""
        self._model.set_attn_implementation(self._stock_attention)

    def run(self, requests: Sequence[Request], query_len: int) -> torch.Tensor:
        """Compute the next ``query_len`` tokens of each of ``requests``.

        Several requests only with one token each: a longer batch would need padding, which states cannot ignore.

        :return: logits of each request's last token, (B, V).
        :raises IntegrityError: if a state is not the request's, or not of its tokens so far, and if the model no
            longer calls the engine's attention: the engine was closed, or somebody gave the model another.
        """
        attention = self._model.config._attn_implementation
        if attention != NAME:
            raise IntegrityError(
                f"the model calls attention {attention!r}, which knows nothing of the cache; an engine that was closed"
                f" cannot go on, and while one is open the attention must stay {NAME!r}",
                value=attention,
                expected=NAME,
            )
        step = build_step(self._binding, requests, query_len, self._device)
        cache = PagedCache(self._binding, step)
        self._ledger.begin(requests, step.state_blocks)
        quiet = without_kernel_advice(holds=self._device.type == "cuda")
        with torch.no_grad(), quiet, self._continued_scan(step, cache):
            logits: torch.Tensor = self._model(**self._inputs(requests, step, cache)).logits
            cache.flush()
        self._ledger.commit(requests, step.state_blocks, [query_len] * len(requests))
        return logits[:, -1]

    def _inputs(self, requests: Sequence[Request], step: ForwardStep, cache: PagedCache) -> dict[str, Any]:
        ends = [start + step.query_len for start in step.starts]
        tokens = [r.tokens(start, end) for r, start, end in zip(requests, step.starts, ends, strict=True)]
        inputs: dict[str, Any] = {
            "input_ids": self._stage_rows(tokens),
            self._traits.cache_argument: cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        if self._binding.attention:
            inputs[CONTEXT] = cache
        if self._traits.takes_positions:
            positions = [range(start, end) for start, end in zip(step.starts, ends, strict=True)]
            inputs["position_ids"] = self._stage_rows(positions)
        return inputs

    def _stage_rows(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Rows of equal length as (B, T) on the device."""
        return stage([number for row in rows for number in row], torch.int64, self._device).view(len(rows), -1)

    def _continued_scan(self, step: ForwardStep, cache: PagedCache) -> AbstractContextManager[None]:
        if self._scan_module is None or self._traits.scan is None or step.is_fresh or step.query_len == 1:
            return nullcontext()
        return initial_states(self._scan_module, self._traits.scan, cache)


def check_model(model: Any, ready: Ready) -> None:
    """Refuse a model that cannot run on the cache as it is.

    :raises ConfigError: in training mode, on another device than the cache, or while another engine has it.
    """
    if model.training:
        raise ConfigError(
            "the model is in training mode, where dropout changes its output; call model.eval() first",
            option="model",
            value="training",
            expected="evaluation mode",
        )
    device = ready.cache.buffer.device
    if model.device != device:
        raise ConfigError(
            f"the model is on {model.device} and the cache on {device}; put both on one device",
            option="device",
            value=str(model.device),
            expected=str(device),
        )
    if model.config._attn_implementation in (NAME, PACKED_NAME):
        raise ConfigError(
            "the model belongs to another engine; close that one first",
            option="model",
            value=model.config._attn_implementation,
            expected="a model without an engine",
        )
