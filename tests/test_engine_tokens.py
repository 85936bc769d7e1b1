"""Greedy tokens of the embedded engine are those of ``model.generate``, and so are the logits behind them.

Everything runs on a cache that is NaN before it is written and NaN again once a block is freed: a stale or unwritten
read turns logits into NaN. Each family has controls that show that these tests can fail.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from engine_setup import DEVICE, MAX_MODEL_LEN, backend_named, make_ready, planned_ready
from makeready.engines.transformers import runner
from makeready.engines.transformers.engine import SamplingParams, TransformersEngine
from makeready.engines.transformers.families import TRAITS
from makeready.engines.transformers.runner import ModelRunner
from tiny_models import ATTENTION_FREE, FAMILIES, HYBRID_FAMILIES
from token_runs import LENGTHS, TOLERANCE, TokenRun, prompts, stock

NEW = 20
PARAMS = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
CASES = [
    (family, backend)
    for backend in ("reference", "flex")
    for family in FAMILIES
    if (family, backend) != ("gpt_oss", "flex")  # flex on CPU refuses attention sinks
]
SCANS = tuple(family for family in HYBRID_FAMILIES if TRAITS[family].scan)


class Recorded(TokenRun):
    """An engine over a poisoned cache that remembers the logits of every token it computed."""

    new = NEW

    def __init__(self, family: str, monkeypatch: pytest.MonkeyPatch, maker=make_ready, **options) -> None:
        super().__init__(family)
        self.ready = maker(self.model, **options)
        self.engine = TransformersEngine(self.model, None, self.ready, poison_freed=True)
        run = ModelRunner.run

        def recording(this, requests, query_len):
            rows = run(this, requests, query_len)
            for request, row in zip(requests, rows, strict=True):
                self._seen[request.id, request.num_computed + query_len] = row
            return rows

        monkeypatch.setattr(ModelRunner, "run", recording)


each = pytest.mark.parametrize(("family", "backend"), CASES)


@each
def test_one_request_at_a_time(family, backend, monkeypatch):
    with Recorded(family, monkeypatch, backend=backend) as run:
        run.check_all([run.generate([index])[0] for index in range(len(LENGTHS))])


@each
def test_batch_of_unequal_prompts(family, backend, monkeypatch):
    with Recorded(family, monkeypatch, backend=backend) as run:
        run.check_all(run.generate())


@each
def test_requests_join_and_leave_while_others_decode(family, backend, monkeypatch):
    with Recorded(family, monkeypatch, backend=backend) as run:
        run.join_and_leave({0: 18, 1: 3, 2: 20, 3: 9, 4: 5})


@each
def test_prefill_in_chunks_of_five(family, backend, monkeypatch):
    with Recorded(family, monkeypatch, backend=backend, max_num_batched_tokens=5, max_num_seqs=1) as run:
        run.check_all(run.generate())


@each
def test_prefill_chunks_beside_decodes(family, backend, monkeypatch):
    with Recorded(family, monkeypatch, backend=backend, max_num_batched_tokens=7, max_num_seqs=4) as run:
        run.check_all(run.generate())


@each
def test_preempted_requests_end_with_the_same_tokens(family, backend, monkeypatch):
    with Recorded(family, monkeypatch, backend=backend) as run:
        pool, need = run.engine.pool, run.engine.scheduler.blocks_needed
        few = max(need(max(LENGTHS) + NEW), 2 * need(LENGTHS[0]))
        taken = pool.allocate(0, pool.num_free - few, "somebody else")
        completions = run.generate()
        pool.free(0, taken, "somebody else")
        run.check_all(completions)
        # States take their blocks at admission, so a model without attention never runs short.
        assert (run.engine.num_preemptions > 0) == (family not in ATTENTION_FREE)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_planned_geometry_gives_the_same_tokens(family, monkeypatch):
    with Recorded(family, monkeypatch, planned_ready, max_num_batched_tokens=13) as run:
        run.check_all(run.generate())


@pytest.mark.parametrize("order", ["HND", "cross_layer_NHD", "cross_layer_HND"])
@pytest.mark.parametrize("family", ["falcon_h1", "kimi_linear", "nemotron_h", "zamba", "zaya"])
def test_every_layout_gives_the_same_tokens(family, order, monkeypatch):
    with Recorded(family, monkeypatch, order=order, max_num_batched_tokens=13) as run:
        run.check_all(run.generate())


@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_control_a_zeroed_state_shows(family, monkeypatch):
    with Recorded(family, monkeypatch) as run:
        assert _error_after_zeroing(run, "states") > 10 * TOLERANCE


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ATTENTION_FREE])
def test_control_zeroed_k_and_v_show(family, monkeypatch):
    with Recorded(family, monkeypatch) as run:
        assert _error_after_zeroing(run, "key_value") > 10 * TOLERANCE


def _error_after_zeroing(run: Recorded, what: str) -> float:
    """Zero all states, or all K and V, after the prompt; the largest error of the next token's logits."""
    request_id = run.engine.add_request(prompts()[4], SamplingParams(max_new_tokens=2, ignore_eos=True))
    run.engine.step()
    for group in run.ready.groups:
        for layer in group.layers:
            if layer.is_state == (what == "states"):
                for pages in getattr(run.ready.cache, what)(layer.layer):
                    pages.zero_()
    run.engine.step()
    row = run._seen[request_id, LENGTHS[4] + 1]
    return float((row - run.logits[4][1]).abs().max())


@pytest.mark.parametrize("family", SCANS)
def test_control_chunks_need_the_initial_state_of_the_scan(family, monkeypatch):
    monkeypatch.setattr(runner, "initial_states", lambda *_: nullcontext())
    with Recorded(family, monkeypatch, max_num_batched_tokens=5, max_num_seqs=1) as run:
        completion = run.engine.generate([prompts()[4]], SamplingParams(max_new_tokens=1, ignore_eos=True))[0]
        assert run.error(completion, 4) > 10 * TOLERANCE


@pytest.mark.parametrize("family", SCANS)
def test_the_modeling_module_is_as_it_was(family, monkeypatch):
    with Recorded(family, monkeypatch, max_num_batched_tokens=5) as run:
        module = __import__(type(run.model).__module__, fromlist=["_"])
        before = module.mamba_selective_scan
        run.generate([4])
        assert module.mamba_selective_scan is before


@pytest.mark.parametrize("family", ["jamba", "mamba2", "gpt_oss"])
def test_a_closed_engine_leaves_the_model_as_it_was(family, monkeypatch):
    model, tokens, _ = stock(family, NEW)
    before = model.config._attn_implementation
    TransformersEngine(model, None, make_ready(model)).close()
    assert model.config._attn_implementation == before
    again = model.generate(torch.tensor([prompts()[0]]), max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    assert again[0, LENGTHS[0] :].tolist() == tokens[0]


def test_traits_name_the_families_with_defects():
    assert {name for name, traits in TRAITS.items() if traits.replays_generated} == {"nemotron_h", "zamba2"}
    assert {name for name, traits in TRAITS.items() if traits.scan} == {"jamba", "zamba", "mamba", "falcon_mamba"}


def test_flex_leaves_out_what_it_refuses():
    assert not backend_named("flex").capabilities(DEVICE).sinks


def test_every_family_that_is_served_is_tested():
    assert set(TRAITS) == set(FAMILIES)
    assert max(LENGTHS) + NEW < MAX_MODEL_LEN
