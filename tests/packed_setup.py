"""An engine with packed steps over a poisoned cache, whose logits are remembered and compared with ``generate``'s."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from engine_setup import make_ready
from makeready.engines.transformers.engine import SamplingParams, TransformersEngine
from makeready.engines.transformers.packed.rows import rows_of
from makeready.engines.transformers.packed.runner import PackedRunner
from tiny_models import FAMILIES, tiny_model

LENGTHS = (9, 3, 17, 1, 26)
NEW = 16
PARAMS = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
TOLERANCE = 2e-3
"""Of logits that are about 10 wide; rounding moves them by up to 6e-4, a lost state by 1."""
PACKED = FAMILIES
"""Families whose requests can be packed."""


@cache
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 128, (length,), generator=generator).tolist() for length in LENGTHS]


@cache
def stock(family: str):
    """The model, and per prompt what ``generate`` makes of it: tokens and the logits behind each."""
    model = tiny_model(family)
    if family == "gemma2":
        model.set_attn_implementation("eager")  # transformers 5.17's sdpa leaves the soft cap out
    tokens, logits = [], []
    for prompt in prompts():
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=-1, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        tokens.append(out.sequences[0, len(prompt) :].tolist())
        logits.append(torch.cat(out.logits))
    return model, tokens, logits


class PackedRun:
    """Runs prompts and checks every token and every logit."""

    def __init__(self, family: str, monkeypatch: pytest.MonkeyPatch, maker=make_ready, **options) -> None:
        self.model, self.tokens, self.logits = stock(family)
        self.ready = maker(self.model, **{"packed_steps": True, **options})
        self.engine = TransformersEngine(self.model, None, self.ready, poison_freed=True)
        assert self.engine.execution.packed
        self.steps: list[tuple[int, ...]] = []
        self._seen: dict[tuple[str, int], torch.Tensor] = {}
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

    def __enter__(self) -> PackedRun:
        return self

    def __exit__(self, *_) -> None:
        self.engine.pool.check_integrity()
        self.engine.close()

    def generate(self, which=(0, 1, 2, 3, 4)):
        return self.engine.generate([prompts()[index] for index in which], PARAMS)

    def error(self, completion, index: int) -> float:
        """Largest difference between the completion's logits and stock's for prompt ``index``."""
        start = len(completion.prompt_token_ids)
        ours = torch.stack([self._seen[completion.request_id, start + i] for i in range(len(completion.token_ids))])
        return float((ours - self.logits[index][: len(ours)]).abs().max().nan_to_num(float("inf")))

    def check(self, completion, index: int) -> None:
        assert list(completion.token_ids) == self.tokens[index][: len(completion.token_ids)]
        assert self.error(completion, index) < TOLERANCE

    def check_all(self, completions) -> None:
        for index, completion in enumerate(completions):
            assert completion.finish_reason == "length"
            self.check(completion, index)
        assert self.engine.pool.num_free == self.engine.pool.capacity
