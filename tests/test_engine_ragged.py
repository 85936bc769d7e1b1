"""Captured steps with prefill, run as on CUDA but for the graph itself: tokens of ``generate``, nobody else's memory.

The cache is NaN before it is written and NaN again once a block is freed.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from capturable_setup import DenseAttention, DenseMixers, use_uncaptured_ragged, use_uncaptured_steps
from engine_setup import make_ready
from makeready.engines.transformers.packed.buckets import RaggedBucket, ragged_buckets
from packed_setup import PARAMS, PackedRun, prompts

FAMILIES = (
    "falcon_h1", "nemotron_h", "qwen3_next", "lfm2", "mamba2", "jamba", "llama", "gemma2", "gpt_oss", "kimi_linear",
    "zaya",
)  # fmt: skip


@pytest.fixture
def dense(monkeypatch):
    """A maker of engines' surroundings whose attention and mixers can be captured."""
    monkeypatch.setattr("makeready.hybrid.mixers.reference.kernels.ReferenceMixers", DenseMixers)

    def maker(model, **options):
        ready = make_ready(model, **options)
        return replace(ready, attention=dict.fromkeys(ready.attention, DenseAttention()))

    return maker


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ahead", [False, True])
def test_prompts_padded_to_a_bucket_give_the_same_tokens(family, ahead, dense, monkeypatch):
    with PackedRun(family, monkeypatch, dense, async_scheduling=ahead) as run:
        ragged = use_uncaptured_ragged(run.engine)
        use_uncaptured_steps(run.engine, (4, 8))
        run.check_all(run.generate())
        assert ragged.replayed[0][0] == tuple(len(prompt) for prompt in prompts())
        assert ragged.replayed[0][1].tokens == 64


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_beside_decodes(family, dense, monkeypatch):
    """Steps of decodes go the same way here: a bucket serves any mixture."""
    with PackedRun(family, monkeypatch, dense, max_num_batched_tokens=9, max_num_seqs=4, async_scheduling=True) as run:
        ragged = use_uncaptured_ragged(run.engine)
        run.check_all(run.generate())
        mixed = [lens for lens, _ in ragged.replayed if 1 in lens and max(lens) > 1]
        assert mixed
        assert len(ragged.replayed) == len(run.steps)


@pytest.mark.parametrize("family", FAMILIES)
def test_dummy_runs_write_nothing_but_the_null_block(family, dense, monkeypatch):
    with PackedRun(family, monkeypatch, dense) as run:
        ragged = use_uncaptured_ragged(run.engine)
        for index in range(3):
            run.engine.add_request(prompts()[index], PARAMS)
        for _ in range(4):
            run.engine.step()
        before = run.ready.cache.pages().clone()
        for bucket in ragged._buckets[:2]:
            logits, _ = ragged.dummy(bucket)
            assert logits.isfinite().all()
        assert torch.equal(run.ready.cache.pages()[1:], before[1:])


def test_buckets_hold_what_may_run():
    few, *_, last = ragged_buckets(256, 8192)
    assert (few.tokens, few.decodes, few.rows) == (16, 16, 16 + 33)
    assert (last.tokens, last.decodes) == (2048, 256)
    assert {bucket.decodes for bucket in ragged_buckets(1, 8192)} == {16}
    assert ragged_buckets(4, 9) == (RaggedBucket(16, 16, 5),)
    assert ragged_buckets(4, 17)[-1].tokens == 32


def test_more_decodes_than_a_step_has_tokens_have_room(dense, monkeypatch):
    """Buckets of decodes are captured up to max_num_seqs, whatever max_num_batched_tokens is."""
    with PackedRun("llama", monkeypatch, dense, max_num_batched_tokens=9, max_num_seqs=64) as run:
        steps = use_uncaptured_steps(run.engine, (64,))
        logits, _ = steps.dummy(64)
        assert len(logits) == 64
