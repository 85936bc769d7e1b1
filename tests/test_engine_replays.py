"""Published bugs of stale or unwritten state, replayed: facts/user_asks.md 1.7 names their threads.

Captured steps are run as on CUDA but for the graph itself: persistent tensors, rows that pad a bucket, dummy runs.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from capturable_setup import DenseAttention, DenseMixers, use_uncaptured_steps
from engine_setup import make_ready, planned_ready
from makeready.engines.transformers.engine import SamplingParams, TransformersEngine
from packed_setup import PARAMS, PackedRun, prompts, stock

CAPTURED = ("falcon_h1", "nemotron_h", "qwen3_next", "lfm2", "mamba2", "llama", "gemma2")


@pytest.fixture
def dense(monkeypatch):
    """A maker of engines' surroundings whose attention and mixers can be captured."""
    monkeypatch.setattr("makeready.hybrid.mixers.reference.kernels.ReferenceMixers", DenseMixers)

    def maker(model, **options):
        ready = make_ready(model, **options)
        return replace(ready, attention=dict.fromkeys(ready.attention, DenseAttention()))

    return maker


@pytest.mark.parametrize("family", CAPTURED)
@pytest.mark.parametrize("ahead", [False, True])
def test_steps_padded_to_a_bucket_give_the_same_tokens(family, ahead, dense, monkeypatch):
    """A padded tail must not become anybody's state (vllm#55178)."""
    with PackedRun(family, monkeypatch, dense, async_scheduling=ahead) as run:
        graphs = use_uncaptured_steps(run.engine, (4, 8))
        run.check_all(run.generate())
        assert any(rows < size for rows, size in graphs.replayed)


@pytest.mark.parametrize("family", CAPTURED)
def test_dummy_runs_write_nothing_but_the_null_block(family, dense, monkeypatch):
    """Rows of requests that have gone stay in the persistent tensors; a capture must not follow them (vllm#49757)."""
    with PackedRun(family, monkeypatch, dense) as run:
        graphs = use_uncaptured_steps(run.engine, (4, 8))
        for index in range(3):
            run.engine.add_request(prompts()[index], PARAMS)
        for _ in range(4):
            run.engine.step()
        before = run.ready.cache.pages().clone()
        logits, _ = graphs.dummy(8)
        assert torch.equal(run.ready.cache.pages()[1:], before[1:])
        assert logits.isfinite().all()
        ended = {}
        while run.engine.has_requests():
            for output in run.engine.step():
                ended[output.request_id] = ended.get(output.request_id, 0) + 1
        assert len(ended) == 3


@pytest.mark.parametrize("poisoned", [False, True])
@pytest.mark.parametrize("family", ["falcon_h1", "lfm2", "qwen3_next", "jamba", "mamba2"])
def test_a_new_request_does_not_meet_the_state_of_a_finished_one(family, poisoned):
    """The same block, not cleared in between: kernels know who is fresh (vllm#56524, ik_llama.cpp#1932)."""
    model, tokens, _ = stock(family)
    ready = make_ready(model, packed_steps=True, max_num_seqs=1)
    engine = TransformersEngine(model, None, ready, poison_freed=poisoned)
    groups = [group.index for group in ready.groups if group.is_state]
    held: list[tuple[int, ...]] = []
    try:
        for index in (4, 0, 3, 2):
            engine.add_request(prompts()[index], PARAMS)
            found = []
            while engine.has_requests():
                running = engine.scheduler.running
                if running and not found:
                    held.append(tuple(running[0].tables[group].blocks[0] for group in groups))
                found += [token for output in engine.step() for token in output.new_token_ids]
            assert found == tokens[index]
    finally:
        engine.close()
    assert engine.pool.num_free == engine.pool.capacity
    if not poisoned:
        cleared = engine._blocks._cleared
        assert not cleared & set(groups)


@pytest.mark.parametrize("family", ["falcon_h1", "qwen3_next"])
def test_a_short_prompt_beside_long_ones_holds_little_and_runs_at_once(family):
    """A 12-token prompt must not take a third of the pool, nor wait for its turn (vllm#54458)."""
    model, _, _ = stock(family)
    generator = torch.Generator().manual_seed(2)
    lengths = (120, 12, 150)
    asked = [torch.randint(3, 128, (length,), generator=generator).tolist() for length in lengths]
    expected = [
        model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=-1)[0, len(prompt) :]
        for prompt in asked
    ]
    ready = planned_ready(model, num_blocks=200, packed_steps=True, max_num_batched_tokens=512)
    engine = TransformersEngine(model, None, ready, poison_freed=True)
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    try:
        for prompt in asked:
            engine.add_request(prompt, params)
        outputs = engine.step()
        running = engine.scheduler.running
        assert [request.num_computed for request in running] == list(lengths)
        held = sum(len(table.blocks) for table in running[1].tables.values())
        assert held <= engine.scheduler.blocks_needed(16)
        while engine.has_requests():
            outputs += engine.step()
        for index, tokens in enumerate(expected):
            assert [
                t for o in outputs if o.request_id == f"request-{index}" for t in o.new_token_ids
            ] == tokens.tolist()
    finally:
        engine.close()
