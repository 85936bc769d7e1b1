"""What is allocated and handed out is what was planned, to the byte and to the block, for every preset."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from makeready.attention_backends.interface import Capabilities
from makeready.cache.allocation import allocate
from makeready.cache.capacity import Holding
from makeready.cache.group_pool import pool_for
from makeready.config import DTYPES, LAYOUTS, EngineConfig, SchedulerConfig
from makeready.engines.transformers.families import Traits
from makeready.engines.transformers.records import SamplingParams
from makeready.engines.transformers.requests import Request
from makeready.engines.transformers.scheduler import Scheduler
from makeready.hybrid.model_specs import ModelSpec, read_model
from makeready.hybrid.presets import preset_names
from makeready.platforms.cuda import CUDA
from makeready.platforms.plan import Plan
from makeready.platforms.planning import plan_model
from makeready.platforms.ready import layout_of

KERNELS = Capabilities(
    name="any", dtypes=frozenset(DTYPES), kv_cache_dtypes=frozenset(DTYPES), kernel_block_multiple=16, layouts=LAYOUTS,
    sliding_window=True, mla=True,
)  # fmt: skip
LENGTHS = (1, 16, 17, 100, 512, 999)
MOST_LAYERS = 3
"""Of each kind: pages and states stay as large as the model's, and everything fits in memory."""


def scaled_down(name: str, engine: str) -> ModelSpec:
    model = read_model(name, engine=engine)
    seen: Counter[object] = Counter()
    kept = []
    for layer in model.layers:
        seen[layer.spec] += 1
        if seen[layer.spec] <= MOST_LAYERS:
            kept.append(layer)
    return replace(model, layers=tuple(kept), max_model_len=1000)


def plan_of(model: ModelSpec, strategy: str, **options) -> Plan:
    config = EngineConfig.from_options(page_strategy=strategy, **options)
    return plan_model(model, CUDA, {layer.layer: KERNELS for layer in model.attention_layers}, config)


def sized_plan(model: ModelSpec, strategy: str) -> Plan:
    """With room for three of the longest requests and a bit that does not divide."""
    sizes = plan_of(model, strategy, num_blocks=1 << 20)
    states, blocks = Holding().request_need(sizes.groups, 1000)
    return plan_of(model, strategy, num_blocks=sizes.strategy.shape.least_blocks(3 * states, 3 * blocks) + 1)


CASES = [
    (name, engine, strategy)
    for name in preset_names()
    for engine in ("vllm", "transformers")
    for strategy in (("unified", "subdivided") if read_model(name, engine=engine).is_hybrid else ("auto",))
]


@pytest.mark.parametrize(("name", "engine", "strategy"), CASES)
def test_allocated_and_handed_out_as_planned(name, engine, strategy):
    model = scaled_down(name, engine)
    plan = sized_plan(model, strategy)
    layout = layout_of(plan, "cross_layer_NHD", plan.capacity.num_blocks)
    check_bytes(plan, allocate(layout, torch.device("cpu")))
    check_one_request(plan, layout)
    check_concurrency(plan, layout)


def check_bytes(plan, cache):
    assert cache.buffer.nbytes == plan.capacity.num_blocks * plan.pool_bytes_per_block
    assert plan.capacity.memory_bytes == cache.buffer.nbytes
    for planned, spec in zip(plan.layers, plan.model.layers, strict=True):
        views = cache.states(planned.layer) if spec.is_state else cache.key_value(planned.layer)
        assert sum(view[0].numel() * view.element_size() for view in views) == planned.page_bytes
        for view in views:
            assert view.stride(0) * view.element_size() in strides_of(plan, spec.is_state)


def strides_of(plan, is_state):
    """Bytes from one id's page to the next one's, in a block-major order."""
    return [plan.strategy.state_page_bytes if is_state else plan.pool_bytes_per_block]


def check_one_request(plan, layout):
    """The scheduler gives a request of n tokens what the plan says, block by block."""
    for length in LENGTHS:
        pool = pool_for(layout)
        tokens = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=4096)
        scheduler = Scheduler(plan.groups, pool, tokens, Traits(model_type="any"), 1000)
        params = SamplingParams(max_new_tokens=1)
        request = Request(id="r", prompt=(1,) * length, params=params, arrival=0)
        scheduler.add(request)
        scheduler.schedule()
        planned = {group.index: Holding().group_blocks(group, length) for group in plan.groups}
        assert {group: len(table.blocks) for group, table in request.tables.items()} == planned
        taken = (pool.capacity - pool.num_free) * plan.pool_bytes_per_block
        states, blocks = Holding().request_need(plan.groups, length)
        assert taken == plan.strategy.shape.blocks(states, blocks) * plan.pool_bytes_per_block
        scheduler.abort(request)
        assert pool.num_free == pool.capacity
        pool.check_integrity()


def check_concurrency(plan, layout):
    """As many requests as planned fit, and not one more; the longest is the longest."""
    for length, planned in plan.capacity.concurrency.items():
        pool = pool_for(layout)
        need = {group.index: Holding().group_blocks(group, length) for group in plan.groups}
        count = 0
        while pool.can_allocate(need):
            for group, blocks in need.items():
                pool.allocate(group, blocks, f"r{count}")
            count += 1
        assert count == planned
        pool.check_integrity()
    assert plan.capacity.max_tokens == plan.max_model_len == 1000


@pytest.mark.parametrize("name", ["nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "LiquidAI/LFM2-1.2B"])
@pytest.mark.parametrize("strategy", ["unified", "subdivided"])
def test_any_number_of_blocks_is_counted_right(name, strategy):
    """Pools that do not divide evenly: what is left over serves attention."""
    model = scaled_down(name, "vllm")
    least = plan_of(model, strategy, num_blocks=1 << 20).strategy.shape.least_blocks(2, 2)
    for num_blocks in range(least, 3 * least, 1 + least // 40):
        plan = plan_of(model, strategy, num_blocks=num_blocks)
        need = {group.index: Holding().group_blocks(group, 1) for group in plan.groups}
        pool = pool_for(layout_of(plan, "cross_layer_NHD", num_blocks))
        longest = {group.index: Holding().group_blocks(group, plan.capacity.max_tokens) for group in plan.groups}
        assert pool.can_allocate(need)
        assert pool.can_allocate(longest)
        if plan.capacity.max_tokens < 1000:
            longer = {g.index: Holding().group_blocks(g, plan.capacity.max_tokens + 1) for g in plan.groups}
            assert not pool.can_allocate(longer)
