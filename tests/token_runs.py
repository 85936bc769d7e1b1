"""What ``model.generate`` makes of five prompts, and an engine whose tokens and logits are compared with it."""

from __future__ import annotations

from functools import cache

import torch

from makeready.engines.transformers.engine import SamplingParams, TransformersEngine
from tiny_models import tiny_model

LENGTHS = (9, 3, 17, 1, 26)
"""Tokens of the prompts."""
TOLERANCE = 2e-3
"""Of logits that are about 10 wide: rounding (of another batch size, say) moves them by up to 6e-4, controls by 1."""


@cache
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 128, (length,), generator=generator).tolist() for length in LENGTHS]


@cache
def stock(family: str, new: int):
    """The model, and per prompt what ``generate`` makes of it: tokens and the logits behind each."""
    model = tiny_model(family)
    if family == "gemma2":
        model.set_attn_implementation("eager")  # transformers 5.17's sdpa leaves the soft cap out
    tokens, logits = [], []
    for prompt in prompts():
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=new, do_sample=False, eos_token_id=-1, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        tokens.append(out.sequences[0, len(prompt) :].tolist())
        logits.append(torch.cat(out.logits))
    return model, tokens, logits


class TokenRun:
    """Runs the prompts and checks every token and every logit; a subclass opens ``engine`` and fills ``_seen``."""

    new: int
    """Tokens to generate."""
    engine: TransformersEngine

    def __init__(self, family: str) -> None:
        self.model, self.tokens, self.logits = stock(family, self.new)
        self._seen: dict[tuple[str, int], torch.Tensor] = {}
        """By request and length so far, the logits of the next token."""

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.engine.pool.check_integrity()
        self.engine.close()

    def generate(self, which=(0, 1, 2, 3, 4)):
        params = SamplingParams(max_new_tokens=self.new, ignore_eos=True)
        return self.engine.generate([prompts()[index] for index in which], params)

    def join_and_leave(self, leaves: dict[int, int]) -> None:
        """Prompts join in steps 0 to 9 while others decode, and leave after ``leaves`` tokens each."""
        joins = {0: 0, 2: 1, 3: 2, 7: 3, 9: 4}
        ids: dict[str, int] = {}
        tokens: dict[int, list[int]] = {}
        step = 0
        while step < 10 or self.engine.has_requests():
            if step in joins:
                params = SamplingParams(max_new_tokens=leaves[joins[step]], ignore_eos=True)
                ids[self.engine.add_request(prompts()[joins[step]], params)] = joins[step]
            for output in self.engine.step():
                tokens.setdefault(ids[output.request_id], []).extend(output.new_token_ids)
            step += 1
        assert tokens == {index: self.tokens[index][:count] for index, count in leaves.items()}
        assert self.engine.pool.num_free == self.engine.pool.capacity

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
