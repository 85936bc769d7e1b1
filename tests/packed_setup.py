"""An engine with packed steps over a poisoned cache, whose logits are remembered and compared with ``generate``'s."""

from __future__ import annotations

import pytest

import token_runs
from engine_setup import make_ready
from makeready.engines.transformers.engine import SamplingParams, TransformersEngine
from makeready.engines.transformers.packed.rows import rows_of
from makeready.engines.transformers.packed.runner import PackedRunner
from tiny_models import FAMILIES
from token_runs import LENGTHS, TokenRun, prompts

__all__ = ["LENGTHS", "NEW", "PACKED", "PARAMS", "PackedRun", "prompts", "stock"]

NEW = 16
PARAMS = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
PACKED = FAMILIES
"""Families whose requests can be packed."""


def stock(family: str):
    """The model, and per prompt what ``generate`` makes of it: tokens and the logits behind each."""
    return token_runs.stock(family, NEW)


class PackedRun(TokenRun):
    """An engine with packed steps that remembers the logits of every token it sampled."""

    new = NEW

    def __init__(self, family: str, monkeypatch: pytest.MonkeyPatch, maker=make_ready, **options) -> None:
        super().__init__(family)
        self.ready = maker(self.model, **{"packed_steps": True, **options})
        self.engine = TransformersEngine(self.model, None, self.ready, poison_freed=True)
        assert self.engine.execution.packed
        self.steps: list[tuple[int, ...]] = []
        launch = PackedRunner.launch

        def recording(this, step):
            rows = rows_of(step)
            ends = [row.end for row in rows if row.samples]
            self.steps.append(tuple(row.length for row in rows))
            flight = launch(this, step)
            for request, end, logits in zip(flight.requests, ends, flight.logits, strict=True):
                self._seen[request.id, end] = logits.clone()
            return flight

        monkeypatch.setattr(PackedRunner, "launch", recording)
