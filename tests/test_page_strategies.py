"""Which page strategy a plan takes and why, what a subdivided plan counts, and random models against every rule."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import makeready
from check_random_decisions import check, check_case, random_case
from makeready.attention_backends.interface import Capabilities
from makeready.cache.capacity import PoolShape
from makeready.cache.specs import AttentionSpec, LayerSpec
from makeready.cache.subdivision import subdivide
from makeready.config import DTYPES, LAYOUTS, EngineConfig
from makeready.errors import BlockSizeError, CapacityError, ConfigError
from makeready.hybrid.model_specs import read_model
from makeready.platforms.address_range import shortest_reach
from makeready.platforms.cuda import CUDA
from makeready.platforms.page_strategies import reads_block_major
from makeready.platforms.plan import Plan
from makeready.platforms.planning import plan_model, without_idle_blocks
from makeready.platforms.ready import layout_of

NANO = "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"
KERNELS = Capabilities(
    name="any", dtypes=frozenset(DTYPES), kv_cache_dtypes=frozenset(DTYPES), kernel_block_multiple=16, layouts=LAYOUTS
)


def planned(model=NANO, kernels=KERNELS, engine="transformers", **options) -> Plan:
    spec = model if not isinstance(model, str) else read_model(model, engine=engine)
    by_layer = {layer.layer: kernels for layer in spec.attention_layers}
    return plan_model(spec, CUDA, by_layer, EngineConfig.from_options(**options))


def test_auto_takes_what_wastes_less_and_says_both_numbers():
    plan = planned()
    assert plan.strategy.name == "subdivided"
    reason = next(said for said in plan.reasons if said.startswith("page strategy"))
    other = planned(page_strategy="unified").strategy.waste_estimate
    assert f"wastes {plan.strategy.waste_estimate:.2%}" in reason
    assert f"unified {other:.2%}" in reason


def test_auto_for_vllm_is_unified_and_says_what_that_costs():
    plan = planned(engine="vllm")
    assert plan.strategy.name == "unified"
    assert any("unified, the one that engine vllm has; it wastes" in said for said in plan.reasons)
    assert not plan.warnings or "engine vllm" not in " ".join(plan.warnings)


def test_subdivided_for_vllm_is_planned_with_a_warning():
    plan = planned(engine="vllm", page_strategy="subdivided")
    assert plan.strategy.name == "subdivided"
    assert any("engine vllm itself knows unified pages only" in said for said in plan.warnings)


def test_the_numbers_of_nemotron_nano():
    """6 attention layers of 1024 bytes a token; 23 states of 2134016 bytes, convolutions a whole multiple of 16."""
    plan = planned(engine="vllm", page_strategy="subdivided", num_blocks=10_000)
    facts = json.loads(json.dumps(plan.to_dict()))
    blocks = -(-23 * 2134016 // (6 * 16 * 1024))
    assert facts["block_size"] == 16
    assert facts["page_strategy"] == "subdivided"
    assert facts["attention_group_width"] == facts["slots_per_block"] == 6
    assert facts["state_page_blocks"] == blocks == 500
    assert facts["states_per_block"] == 1
    assert facts["pool_bytes_per_block"] == 6 * 16 * 1024
    assert facts["request_state_bytes"] == 23 * 2134016
    needed = 23 * 2134016 + 1000 * 6 * 1024
    taken = (blocks + 63) * 6 * 16 * 1024
    assert facts["waste_estimate_pct"] == pytest.approx(100 * (1 - needed / taken), abs=1e-3)
    assert facts["capacity"]["concurrency"]["512"] == 9_999 // (blocks + 32)
    assert facts["capacity"]["floor_bytes_per_request"] == (blocks + 1) * 6 * 16 * 1024


def test_small_states_share_a_block():
    plan = planned("LiquidAI/LFM2-350M", engine="vllm", page_strategy="subdivided")
    assert plan.strategy.shape == PoolShape(block_bytes=6 * 16 * 2048, states_per_block=4)
    assert any("4 requests' states share one block" in said for said in plan.reasons)


def test_kernels_that_need_a_layer_s_pages_together_get_one_layer_a_block():
    narrow = replace(KERNELS, layouts=("NHD", "HND"))
    plan = planned(kernels=narrow)
    assert plan.strategy.attention_group_width == 1
    assert any("one layer a block" in said for said in plan.reasons)
    assert planned(layout="HND").strategy.attention_group_width == 1
    assert planned(layout="cross_layer_HND").strategy.attention_group_width == 6
    assert not reads_block_major([KERNELS, narrow], "auto")


def test_kernels_with_a_short_reach_get_unified_pages_of_a_large_pool():
    short = replace(KERNELS, max_view_elements=2**31 - 1)
    assert planned(kernels=short, memory_bytes=1 << 30).strategy.name == "subdivided"
    plan = planned(kernels=short, memory_bytes=64 << 30)
    assert plan.strategy.name == "unified"
    assert any("any addresses 2147483647 elements" in said for said in plan.reasons)


def test_reach_counts_the_pool_that_is_left_once_idle_blocks_are_trimmed():
    """A large device does not matter where a few short requests leave most of it idle."""
    spec = read_model(NANO)
    short = {layer.layer: replace(KERNELS, max_view_elements=2**31 - 1) for layer in spec.attention_layers}
    large = {"device_memory_bytes": 139 << 30, "max_num_seqs": 8}
    for length, strategy in ((8192, "subdivided"), (131072, "unified")):
        config = EngineConfig.from_options(**large, max_model_len=length)
        plan = plan_model(spec, CUDA, short, config)
        assert plan.strategy.name == strategy
        fitted = without_idle_blocks(plan, config)
        reach = shortest_reach(layout_of(fitted, "cross_layer_NHD", fitted.capacity.num_blocks), short)
        if strategy == "subdivided":
            assert fitted.capacity.num_blocks <= reach.num_blocks
    fixed = EngineConfig.from_options(num_blocks=1 << 20, max_model_len=8192)
    assert plan_model(spec, CUDA, short, fixed).strategy.name == "unified"


def test_subdivided_is_refused_where_there_is_one_kind_of_page():
    with pytest.raises(ConfigError, match="Qwen/Qwen3-8B stores only attention, so that there is one kind of page"):
        planned("Qwen/Qwen3-8B", page_strategy="subdivided")
    assert planned("Qwen/Qwen3-8B").strategy.name == "unified"


def test_a_strategy_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="page_strategy 'best' is not known; choose from auto, unified, subdivided"):
        planned(page_strategy="best")


def attention(layer, heads, dtype="bfloat16"):
    spec = AttentionSpec(num_query_heads=8, num_kv_heads=heads, head_size=64, head_size_v=64, dtype=dtype)
    return LayerSpec(layer=layer, spec=spec)


def test_layers_of_several_widths_share_blocks_or_are_refused():
    states = tuple(x for x in read_model(NANO).layers if x.is_state)
    mixed = subdivide([*states, *(attention(n, 2) for n in range(4)), *(attention(9 + n, 4) for n in range(2))], 16)
    widths = {spec.num_kv_heads: width for spec, width in mixed.widths.items()}
    assert widths == {2: 4, 4: 2}
    with pytest.raises(CapacityError, match="finds no block for attention pages of 8192 bytes and 12288 bytes"):
        subdivide([*states, attention(100, 2), attention(101, 3)], 16)


def test_auto_takes_unified_where_subdivided_is_impossible():
    model = read_model(NANO)
    layers = (*(x for x in model.layers if x.is_state), attention(100, 2), attention(101, 3))
    plan = planned(replace(model, layers=layers))
    assert plan.strategy.name == "unified"
    assert any("the other strategy is impossible: page_strategy subdivided finds no block" in r for r in plan.reasons)


def test_auto_takes_subdivided_where_unified_is_impossible():
    exact = replace(KERNELS, exact_block_sizes=(16,), kernel_block_multiple=1)
    with pytest.raises(BlockSizeError, match="no KV block size"):
        planned(kernels=exact, page_strategy="unified")
    assert planned(kernels=exact).strategy.name == "subdivided"


def test_kept_states_follow_the_block_and_the_users_distance():
    plan = planned(engine="vllm", page_strategy="subdivided", mamba_cache_mode="all", num_blocks=100_000)
    per_token = 6 * 1024
    assert plan.decision.mamba_block_size == ceil(23 * 2134016 / per_token / 16) * 16
    asked = planned(
        engine="vllm", page_strategy="subdivided", mamba_cache_mode="align", mamba_block_size=4096, num_blocks=100_000
    )
    assert asked.decision.mamba_block_size == 4096
    with pytest.raises(BlockSizeError, match="mamba_block_size 1000 is refused"):
        planned(engine="vllm", page_strategy="subdivided", mamba_cache_mode="align", mamba_block_size=1000)


def test_blocks_that_no_request_can_use_are_left_out():
    config = EngineConfig.from_options(device_memory_bytes=1 << 40, max_num_seqs=2, max_model_len=1000)
    spec = read_model(NANO)
    plan = plan_model(spec, CUDA, {layer.layer: KERNELS for layer in spec.attention_layers}, config)
    fitted = without_idle_blocks(plan, config)
    assert fitted.capacity.num_blocks == plan.strategy.shape.least_blocks(2, 2 * 63)
    assert fitted.capacity.concurrency[1000] == 2
    assert "are all that 2 requests of 1000 tokens can hold" in fitted.reasons[-1]


def test_the_public_plan_takes_the_setting():
    plan = makeready.plan("LiquidAI/LFM2-1.2B", platform="cuda", page_strategy="subdivided", memory_bytes=1 << 30)
    assert plan.strategy.name == "subdivided"
    assert "subdivided" in plan.explain()


@settings(max_examples=150, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(0, 9))
def test_random_decisions_of_hypothesis(source, number):
    assert check_case(random_case(source), number)[1] == []


def test_random_decisions():
    """The first of the 200,000 that ``python tests/check_random_decisions.py`` checks."""
    outcomes, faults = check(2000, 20)
    assert faults == []
    assert outcomes["auto planned, subdivided"] > 100
    assert outcomes["subdivided planned, subdivided"] > 200


def test_the_random_check_sees_faults(monkeypatch):
    module = sys.modules["check_random_decisions"]
    real = module.plan_case

    def wrong(case, strategy, **more):
        plan = real(case, strategy, **more)
        size = plan.decision.block_size
        return replace(plan, decision=replace(plan.decision, block_size=max(1, size // 2 + 1)))

    monkeypatch.setattr(module, "plan_case", wrong)
    assert check(20, 20)[1]


@pytest.mark.parametrize(("size", "nearest"), [(100, (96, 112)), (7, (16,))])
def test_a_refused_size_gets_the_nearest_that_auto_takes(size, nearest):
    with pytest.raises(BlockSizeError, match="any needs a multiple of 16; the nearest size") as caught:
        planned(block_size=size)
    assert caught.value.expected == nearest
    assert all(planned(block_size=works).strategy.name == "subdivided" for works in nearest)
    with pytest.raises(BlockSizeError, match="state needs at least"):
        planned(block_size=size, page_strategy="unified")
