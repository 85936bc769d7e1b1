"""Packed steps give the tokens of ``model.generate``, in every family, and so do steps that run ahead of the host.

Everything runs on a cache that is NaN before it is written and NaN again once a block is freed.
"""

from __future__ import annotations

import pytest

from engine_setup import planned_ready
from makeready.engines.transformers.engine import TransformersEngine
from makeready.errors import UnsupportedModelError
from packed_setup import LENGTHS, NEW, PACKED, PARAMS, PackedRun, prompts, stock
from tiny_models import ATTENTION_FREE

AHEAD = pytest.mark.parametrize("ahead", [False, True])
each = pytest.mark.parametrize("family", PACKED)


@each
@AHEAD
def test_batch_of_unequal_prompts(family, ahead, monkeypatch):
    with PackedRun(family, monkeypatch, async_scheduling=ahead) as run:
        run.check_all(run.generate())
        assert run.steps[0] == LENGTHS  # all prompts in one forward


@each
def test_prefill_chunks_beside_decodes(family, monkeypatch):
    with PackedRun(family, monkeypatch, max_num_batched_tokens=7, max_num_seqs=4, async_scheduling=True) as run:
        run.check_all(run.generate())
        assert any(1 in step and max(step) > 1 for step in run.steps)


@each
def test_requests_join_and_leave_while_others_decode(family, monkeypatch):
    with PackedRun(family, monkeypatch, async_scheduling=True) as run:
        run.join_and_leave({0: 16, 1: 3, 2: 16, 3: 9, 4: 5})


@each
@AHEAD
def test_preempted_requests_end_with_the_same_tokens(family, ahead, monkeypatch):
    with PackedRun(family, monkeypatch, async_scheduling=ahead) as run:
        pool, need = run.engine.pool, run.engine.scheduler.blocks_needed
        few = max(need(max(LENGTHS) + NEW), 2 * need(LENGTHS[0]))
        taken = pool.allocate(0, pool.num_free - few, "somebody else")
        completions = run.generate()
        pool.free(0, taken, "somebody else")
        run.check_all(completions)
        assert (run.engine.num_preemptions > 0) == (family not in ATTENTION_FREE)


@pytest.mark.parametrize("family", ["falcon_h1", "lfm2", "qwen3_next", "mamba"])
def test_the_planned_geometry_gives_the_same_tokens(family, monkeypatch):
    with PackedRun(family, monkeypatch, planned_ready, max_num_batched_tokens=13) as run:
        run.check_all(run.generate())


@pytest.mark.parametrize("family", ["falcon_h1", "qwen3_next"])
def test_states_may_be_stored_in_fewer_bits(family, monkeypatch):
    """Kernels compute in float32 whatever the pages hold; the model's own code would refuse."""
    options = {"mamba_ssm_cache_dtype": "bfloat16"}
    model, tokens, _ = stock(family)
    ready = planned_ready(model, packed_steps=True, **options)
    engine = TransformersEngine(model, None, ready)
    try:
        found = engine.generate(prompts(), PARAMS)
        assert all(done.token_ids[0] == expected[0] for done, expected in zip(found, tokens, strict=True))
    finally:
        engine.close()
    with pytest.raises(UnsupportedModelError, match="of bfloat16"):
        TransformersEngine(model, None, planned_ready(model, **options))
