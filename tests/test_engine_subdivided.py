"""The embedded engine on subdivided pages: the same tokens and logits as ``model.generate``, on NaN-poisoned memory."""

from __future__ import annotations

from functools import cache

import pytest

from engine_setup import DEVICE, backend_named, spec_of
from makeready.cache.capacity import PoolShape
from makeready.cache.subdivided_pool import SubdividedPool
from makeready.config import EngineConfig
from makeready.platforms.cpu import CPU
from makeready.platforms.planning import plan_model
from makeready.platforms.ready import Ready, make_ready
from test_engine_tokens import Recorded, prompts
from tiny_models import ATTENTION_FREE, HYBRID_FAMILIES, tiny_model

FAMILIES = tuple(family for family in HYBRID_FAMILIES if family not in ATTENTION_FREE)
ORDERS = ("NHD", "cross_layer_NHD")
"""One layer a block, and as many as padding allows."""


def subdivided(
    model, *, backend="reference", block_size=16, num_blocks=160, layout="cross_layer_NHD", **options
) -> Ready:
    """What startup makes of these settings, poisoned."""
    spec = spec_of(model)
    config = EngineConfig.from_options(
        num_blocks=num_blocks,
        block_size=block_size,
        layout=layout,
        max_model_len=64,
        page_strategy="subdivided",
        **options,
    )
    reader = backend_named(backend)
    chosen = {layer.layer: reader for layer in spec.attention_layers}
    capabilities = dict.fromkeys(chosen, reader.capabilities(DEVICE))
    ready = make_ready(config, plan_model(spec, CPU, capabilities, config, DEVICE), chosen, DEVICE)
    ready.cache.poison()
    return ready


@cache
def shape(family: str, layout: str, block_size: int) -> PoolShape:
    """The geometry alone."""
    return subdivided(tiny_model(family), layout=layout, block_size=block_size).plan.strategy.shape


def recorded(family, monkeypatch, **options) -> Recorded:
    return Recorded(family, monkeypatch, subdivided, **options)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_in_chunks_beside_decodes(family, order, monkeypatch):
    with recorded(family, monkeypatch, layout=order, max_num_batched_tokens=7, max_num_seqs=4) as run:
        sizes = run.ready.plan.strategy.shape
        apart = (sizes.state_page_blocks, sizes.states_per_block) != (1, 1)
        assert isinstance(run.engine.pool, SubdividedPool) == apart
        run.check_all(run.generate())


@pytest.mark.parametrize("family", FAMILIES)
def test_preempted_requests_end_with_the_same_tokens(family, monkeypatch):
    """Little more than the longest request needs; every page changes hands between states and attention."""
    with recorded(family, monkeypatch, block_size=4) as run:
        layout, attention = run.ready.cache.layout, sum(not group.is_state for group in run.ready.groups)
        few = max(layout.shape.least_blocks(5, 0), layout.shape.least_blocks(1, 64 // 4 * attention))
    with recorded(family, monkeypatch, block_size=4, num_blocks=few) as run:
        run.check_all(run.generate())
        assert run.engine.num_preemptions > 0, layout.shape
        if isinstance(run.engine.pool, SubdividedPool):
            assert run.engine.pool.num_whole_pages == layout.shape.num_state_pages(few) - 1


@pytest.mark.parametrize("family", ["nemotron_h", "lfm2"])
def test_flex_reads_them_too(family, monkeypatch):
    with recorded(family, monkeypatch, backend="flex") as run:
        run.check_all(run.generate())


@pytest.mark.parametrize("order", ["HND", "cross_layer_HND"])
@pytest.mark.parametrize("family", ["falcon_h1", "zamba"])
def test_heads_before_tokens(family, order, monkeypatch):
    with recorded(family, monkeypatch, layout=order) as run:
        run.check_all(run.generate())


def test_the_tiny_models_show_every_shape():
    """States over several blocks, states that share one, and blocks of more than one layer."""
    shapes = [shape(family, order, size) for family in FAMILIES for order in ORDERS for size in (4, 16)]
    assert any(found.state_page_blocks > 2 for found in shapes)
    assert any(found.states_per_block > 1 for found in shapes)
    wide = [f for f in FAMILIES if shape(f, "cross_layer_NHD", 4).block_bytes > shape(f, "NHD", 4).block_bytes]
    assert len(wide) > 1


def test_states_that_share_a_block_stay_apart(monkeypatch):
    with recorded("lfm2", monkeypatch, layout="NHD", num_blocks=24) as run:
        assert run.ready.cache.layout.shape.states_per_block > 1
        run.check_all(run.generate())
        assert len(prompts()) > 2
