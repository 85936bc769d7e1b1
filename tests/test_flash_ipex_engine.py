"""Tokens of the embedded engine with attention by IPEX are those of ``model.generate``: hybrids, MLA, windows, caps.

Runs where IPEX is installed (tests/ipex_environment.py), with a cache that is NaN until it is written.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

if find_spec("intel_extension_for_pytorch") is None or find_spec("transformers") is None:
    pytest.skip(
        "Intel Extension for PyTorch or transformers is not installed; see tests/ipex_environment.py",
        allow_module_level=True,
    )

import engine_setup
from tiny_models import tiny_model

from makeready.attention_backends.flash import FlashBackend
from makeready.engines.transformers.engine import SamplingParams, TransformersEngine
from makeready.errors import BackendError

PROMPTS = [[5, 17, 9, 80, 44, 3, 21, 64, 90], [7], [11, 12, 13, 99, 55, 31] * 5]
NEW = 20


@pytest.fixture(autouse=True)
def flash_for_every_layer(monkeypatch):
    monkeypatch.setattr(engine_setup, "backend_named", lambda _: FlashBackend())


@pytest.mark.parametrize("order", ["HND", "cross_layer_HND"])
@pytest.mark.parametrize("family", ["llama", "nemotron_h", "falcon_h1", "qwen3_next", "kimi_linear", "gemma2"])
def test_tokens_are_those_of_generate(family, order):
    model = tiny_model(family)
    if family == "gemma2":
        model.set_attn_implementation("eager")  # transformers' sdpa leaves the soft cap out
    expected = []
    for prompt in PROMPTS:
        tokens = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=NEW,
            do_sample=False, eos_token_id=-1,
        )  # fmt: skip
        expected.append(tokens[0, len(prompt) :].tolist())
    ready = engine_setup.make_ready(model, backend="flash", order=order, block_size=48, max_num_batched_tokens=7)
    engine = TransformersEngine(model, None, ready, poison_freed=True)
    completions = engine.generate(PROMPTS, SamplingParams(max_new_tokens=NEW, ignore_eos=True))
    engine.close()
    found = [list(completion.token_ids) for completion in completions]
    assert found == expected


def test_sinks_are_refused_by_name():
    model = tiny_model("gpt_oss")
    engine = TransformersEngine(model, None, engine_setup.make_ready(model, backend="flash", order="HND"))
    with pytest.raises(BackendError, match="no attention sinks"):
        engine.generate(PROMPTS, SamplingParams(max_new_tokens=2, ignore_eos=True))


def test_pages_in_another_order_are_refused_by_name():
    model = tiny_model("llama")
    engine = TransformersEngine(model, None, engine_setup.make_ready(model, backend="flash", order="NHD"))
    with pytest.raises(BackendError, match="reads HND pages"):
        engine.generate(PROMPTS, SamplingParams(max_new_tokens=2, ignore_eos=True))
