"""Tokens of the embedded engine with attention by IPEX are those of ``model.generate``: hybrids, MLA, windows, caps.

Runs where IPEX is installed (tools/ipex_environment.py), with a cache that is NaN until it is written.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

if find_spec("intel_extension_for_pytorch") is None or find_spec("transformers") is None:
    pytest.skip(
        "Intel Extension for PyTorch or transformers is not installed; see tools/ipex_environment.py",
        allow_module_level=True,
    )

import engine_setup
from makeready.attention_backends.flash import FlashBackend
from makeready.engines.transformers.engine import SamplingParams, TransformersEngine
from makeready.errors import BackendError
from makeready.startup import prepare
from tiny_models import tiny_model

PROMPTS = [[5, 17, 9, 80, 44, 3, 21, 64, 90], [7], [11, 12, 13, 99, 55, 31] * 5]
NEW = 20


@pytest.fixture(autouse=True)
def flash_for_every_layer(monkeypatch):
    monkeypatch.setattr(engine_setup, "backend_named", lambda _: FlashBackend())


def stock_tokens(model):
    """What ``generate`` makes of each prompt, alone."""
    tokens = []
    for prompt in PROMPTS:
        sequence = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=NEW,
            do_sample=False, eos_token_id=-1,
        )[0]  # fmt: skip
        tokens.append(sequence[len(prompt) :].tolist())
    return tokens


@pytest.mark.parametrize("order", ["HND", "cross_layer_HND"])
@pytest.mark.parametrize("family", ["llama", "nemotron_h", "falcon_h1", "qwen3_next", "kimi_linear", "gemma2"])
def test_tokens_are_those_of_generate(family, order):
    model = tiny_model(family)
    if family == "gemma2":
        model.set_attn_implementation("eager")  # transformers' sdpa leaves the soft cap out
    expected = stock_tokens(model)
    ready = engine_setup.make_ready(model, backend="flash", order=order, block_size=48, max_num_batched_tokens=7)
    engine = TransformersEngine(model, None, ready, poison_freed=True)
    completions = engine.generate(PROMPTS, SamplingParams(max_new_tokens=NEW, ignore_eos=True))
    engine.close()
    found = [list(completion.token_ids) for completion in completions]
    assert found == expected


def test_prepare_finds_it_its_layout_and_the_same_tokens(tmp_path):
    model = tiny_model("falcon_h1")
    model.save_pretrained(tmp_path)
    ready = prepare(str(tmp_path), backend="flash", num_blocks=16)
    assert "HND, the first that flash can read" in ready.explain()
    engine = TransformersEngine(model, None, ready)
    completions = engine.generate(PROMPTS, SamplingParams(max_new_tokens=NEW, ignore_eos=True))
    engine.close()
    assert [list(completion.token_ids) for completion in completions] == stock_tokens(model)


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
