"""On a CUDA device: tokens of ``model.generate`` in float32, whatever is compiled, captured, or ahead of the host."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from capturable_setup import DenseAttention, DenseMixers
from engine_setup import make_ready
from makeready.device import DeviceFacts
from makeready.engines.transformers.engine import SamplingParams, TransformersEngine
from tiny_models import FAMILIES as ALL
from tiny_models import HYBRID_FAMILIES, tiny_model

pytestmark = pytest.mark.cuda
CUDA = DeviceFacts(platform="cuda", device_type="cuda")
FAMILIES = ("falcon_h1", "nemotron_h", "qwen3_next", "lfm2", "mamba2", "llama", "granitemoehybrid")
LENGTHS = (9, 3, 17, 1, 26, 5, 40)
NEW = 24
PARAMS = SamplingParams(max_new_tokens=NEW, ignore_eos=True)


@cache
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 128, (length,), generator=generator).tolist() for length in LENGTHS]


@cache
def stock(family: str):
    model = tiny_model(family).to("cuda")
    if family == "gemma2":
        model.set_attn_implementation("eager")  # transformers 5.17's sdpa leaves the soft cap out
    if model.config._experts_implementation == "grouped_mm":
        model.set_experts_implementation("batched_mm")  # grouped_mm of float32 waits for the device
    tokens = []
    for prompt in prompts():
        ids = torch.tensor([prompt], device="cuda")
        out = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
        tokens.append(out[0, len(prompt) :].tolist())
    return model, tokens


def check(family: str, dense: bool = True, **options) -> None:
    model, tokens = stock(family)
    ready = make_ready(model, device=CUDA, max_num_seqs=6, **{"packed_steps": True, **options})
    if dense:
        ready = replace(ready, attention=dict.fromkeys(ready.attention, DenseAttention()))
        if "mixer_backend" not in options and ready.mixers is not None:
            ready = replace(ready, mixers=DenseMixers())
    engine = TransformersEngine(model, None, ready, poison_freed=True)
    try:
        for option in ("compile_layers", "cuda_graphs", "async_scheduling"):
            assert getattr(engine.execution, option) == options[option], engine.execution.reasons
        reasons = engine.execution.reasons
        ragged = ready.mixers is None or ready.mixers.captures_ragged
        assert engine.execution.prefill_graphs == (options["cuda_graphs"] and dense and ragged), reasons
        found = [list(done.token_ids) for done in engine.generate(prompts(), PARAMS)]
        assert found == tokens
        alone = engine.generate(prompts()[2:3], PARAMS)[0]
        assert list(alone.token_ids) == tokens[2]
        assert engine.pool.num_free == engine.pool.capacity
    finally:
        engine.close()


def modes(compiled: bool, graphs: bool, ahead: bool) -> dict[str, bool]:
    return {"compile_layers": compiled, "cuda_graphs": graphs, "async_scheduling": ahead}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "mode",
    [modes(False, False, False), modes(False, False, True), modes(False, True, False), modes(False, True, True)],
    ids=["plain", "ahead", "graphs", "graphs-ahead"],
)
def test_tokens(family, mode):
    check(family, **mode)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_compiled(family):
    check(family, **modes(True, True, True))


@pytest.mark.parametrize("family", ["falcon_h1", "nemotron_h", "qwen3_next", "mamba2", "lfm2", "jamba"])
def test_tokens_with_kernels(family):
    check(family, mixer_backend="triton", **modes(False, True, True))


def test_chunks_beside_captured_decodes():
    check("falcon_h1", max_num_batched_tokens=9, **modes(False, True, True))


def check_captured_prefill(family: str, tokens: int) -> None:
    options = {"mixer_backend": "triton"} if family in HYBRID_FAMILIES else {}
    check(family, max_num_batched_tokens=tokens, **options, **modes(False, True, True))


@pytest.mark.parametrize("tokens", [9, 64])
@pytest.mark.parametrize("family", ["falcon_h1", "nemotron_h", "qwen3_next", "kimi_linear", "zaya"])
def test_captured_prefill(family, tokens):
    check_captured_prefill(family, tokens)


@pytest.mark.parametrize("family", sorted(ALL))
def test_every_family_is_captured(family):
    check_captured_prefill(family, 40)


def test_prefills_by_a_library_beside_captured_decodes():
    """In bfloat16 two sets of kernels differ by rounding, after which greedy tokens may part."""
    pytest.importorskip("fla", reason="flash-linear-attention is not installed")
    tokens = {}
    for name in ("triton", "fla"):
        model = tiny_model("qwen3_next", dtype="bfloat16").to("cuda")
        options = {"packed_steps": True, "mixer_backend": name, "max_num_batched_tokens": 24}
        ready = make_ready(model, device=CUDA, max_num_seqs=6, **options, **modes(False, True, True))
        engine = TransformersEngine(model, None, replace(ready, attention=_dense(ready)), poison_freed=True)
        try:
            assert engine.execution.cuda_graphs, engine.execution.reasons
            tokens[name] = [list(done.token_ids) for done in engine.generate(prompts(), PARAMS)]
        finally:
            engine.close()
    assert [len(found) for found in tokens["fla"]] == [NEW] * len(LENGTHS)
    first = [(found[0], wanted[0]) for found, wanted in zip(tokens["fla"], tokens["triton"], strict=True)]
    assert sum(found == wanted for found, wanted in first) >= len(first) - 1


def _dense(ready):
    return dict.fromkeys(ready.attention, DenseAttention())
