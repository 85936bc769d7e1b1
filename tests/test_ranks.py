"""Plans for many ranks: stages of a pipeline, replicas, and what all of them serve together."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import makeready
from makeready.attention_backends.interface import Capabilities
from makeready.cache.allocation import allocate
from makeready.cache.capacity import Holding
from makeready.cache.group_pool import pool_for
from makeready.cli import cli
from makeready.config import DTYPES, LAYOUTS, EngineConfig
from makeready.errors import CapacityError, ConfigError
from makeready.hybrid.model_specs import read_model
from makeready.hybrid.pipeline import stage_layers
from makeready.hybrid.presets import preset_names
from makeready.platforms.cuda import CUDA
from makeready.platforms.plan import Plan
from makeready.platforms.planning import plan_model, without_idle_blocks
from makeready.platforms.ready import stage_layout

NANO = "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"
KERNELS = Capabilities(
    name="any", dtypes=frozenset(DTYPES), kv_cache_dtypes=frozenset(DTYPES), kernel_block_multiple=16, layouts=LAYOUTS
)


def planned(model=NANO, engine="vllm", **options) -> Plan:
    spec = read_model(model, engine=engine) if isinstance(model, str) else model
    config = EngineConfig.from_options(**options)
    return plan_model(spec, CUDA, {layer.layer: KERNELS for layer in spec.attention_layers}, config)


@pytest.mark.parametrize(
    ("layers", "stages", "expected"),
    [
        (32, 1, [32]), (32, 4, [8, 8, 8, 8]), (10, 4, [2, 3, 3, 2]), (5, 3, [2, 2, 1]), (7, 4, [2, 2, 2, 1]),
        (9, 4, [2, 2, 3, 2]), (3, 3, [1, 1, 1]),
    ],
)  # fmt: skip
def test_the_rest_goes_to_the_stages_before_the_last(layers, stages, expected):
    assert [len(part) for part in stage_layers(layers, stages)] == expected


@given(st.integers(1, 200), st.integers(1, 64))
def test_stages_are_all_layers_in_order(layers, stages):
    if stages > layers:
        with pytest.raises(ConfigError, match=f"pipeline_parallel_size {stages} is more than the model's {layers}"):
            stage_layers(layers, stages)
        return
    parts = stage_layers(layers, stages)
    assert [layer for part in parts for layer in part] == list(range(layers))
    assert {len(part) for part in parts} <= {layers // stages, layers // stages + 1}
    assert stages == 1 or len(parts[-1]) == layers // stages


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
@pytest.mark.parametrize("pp", [2, 4])
@pytest.mark.parametrize("dp", [1, 2])
def test_every_preset_on_many_ranks(engine, pp, dp):
    for name in preset_names():
        whole = planned(name, engine, memory_bytes=1 << 38)
        plan = planned(
            name, engine, memory_bytes=1 << 38, pipeline_parallel_size=pp, data_parallel_size=dp,
            page_strategy=whole.strategy.name,
        )  # fmt: skip
        facts = json.loads(json.dumps(plan.to_dict()))
        assert plan.block_size == whole.block_size
        assert [stage["index"] for stage in facts["stages"]] == list(range(pp))
        assert [layer for stage in plan.stages for layer in stage.layers] == list(range(plan.model.num_layers))
        grouped = Counter(layer for stage in plan.stages for group in stage.groups for layer in group.layers)
        assert grouped == Counter(plan.model.layers)
        assert all(
            layer.layer in stage.layers for stage in plan.stages for group in stage.groups for layer in group.layers
        )
        check_minimum(plan)
        assert (facts["replicas"], facts["total_ranks"]) == (dp, pp * dp)
        assert facts["total_concurrency"] == {n: dp * count for n, count in facts["capacity"]["concurrency"].items()}
        assert "pipeline stages" in plan.explain()


def check_minimum(plan):
    known = [stage.capacity for stage in plan.stages if stage.capacity is not None]
    assert len(known) == sum(bool(stage.groups) for stage in plan.stages)
    assert plan.capacity.num_blocks == min(one.num_blocks for one in known)
    assert plan.capacity.max_tokens == min(one.max_tokens for one in known)
    for length, count in plan.capacity.concurrency.items():
        assert count == min(one.concurrency[length] for one in known)
    tight = plan.stages[plan.tightest_stage]
    assert (tight.groups, tight.shape) == (plan.groups, plan.strategy.shape)
    assert tight.capacity.max_tokens == plan.capacity.max_tokens


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_one_rank_has_one_stage_that_is_the_plan(engine):
    for name in preset_names():
        plan = planned(name, engine, memory_bytes=1 << 38)
        (stage,) = plan.stages
        assert stage.layers == tuple(range(plan.model.num_layers))
        assert (stage.groups, stage.slots_per_block, stage.pool_bytes_per_block, stage.capacity, stage.shape) == (
            plan.groups, plan.slots_per_block, plan.pool_bytes_per_block, plan.capacity, plan.strategy.shape,
        )  # fmt: skip
        assert (plan.total_ranks, plan.replicas, plan.total_concurrency) == (1, 1, plan.capacity.concurrency)
        assert "pipeline" not in plan.explain()


def lopsided(strategy: str, **options) -> Plan:
    """Three stages: states only, both, attention only."""
    model = read_model(NANO, engine="transformers")
    state, attention = model.state_layers[0], model.attention_layers[0]
    kinds = [state] * 4 + [state, attention] * 2 + [attention] * 4
    layers = tuple(replace(layer, layer=index) for index, layer in enumerate(kinds))
    few = replace(model, layers=layers, num_layers=12, max_model_len=1000)
    return planned(few, page_strategy=strategy, pipeline_parallel_size=3, **options)


@pytest.mark.parametrize("strategy", ["unified", "subdivided"])
def test_stages_without_attention_or_without_states(strategy):
    plan = lopsided(strategy, num_blocks=1 << 16)
    only_states, both, only_attention = plan.stages
    assert {group.kind for group in only_states.groups} == {"mamba2"}
    assert {group.kind for group in both.groups} == {"mamba2", "attention"}
    assert {group.kind for group in only_attention.groups} == {"attention"}
    assert all(stage.page_strategy == strategy for stage in plan.stages)
    assert only_states.capacity.max_tokens == 1000
    assert only_states.capacity.concurrency[512] == (1 << 16) - 1
    assert (only_attention.state_bytes, only_states.state_bytes) == (0, 2 * both.state_bytes)
    if strategy == "unified":
        assert len({stage.page_bytes for stage in plan.stages}) == 1
    else:
        assert only_states.shape.block_bytes - only_states.state_bytes < 16 * 8
        assert only_attention.capacity.concurrency[512] * 512 // plan.block_size <= 1 << 16


@pytest.mark.parametrize("strategy", ["unified", "subdivided"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_stage_is_allocated_and_handed_out_as_planned(strategy, stage):
    shapes = lopsided(strategy, num_blocks=1 << 16).stages
    need = [Holding().request_need(one.groups, 1000) for one in shapes]
    blocks = max(
        one.shape.least_blocks(2 * states, 2 * count) for one, (states, count) in zip(shapes, need, strict=True)
    )
    plan = lopsided(strategy, num_blocks=blocks)
    found = plan.stages[stage]
    layout = stage_layout(found, plan.block_size, "cross_layer_NHD", found.capacity.num_blocks)
    if layout.total_bytes < 1 << 31:
        cache = allocate(layout, torch.device("cpu"))
        assert cache.buffer.nbytes == found.capacity.num_blocks * found.pool_bytes_per_block
    for length, count in found.capacity.concurrency.items():
        pool, fitted = pool_for(layout), 0
        wanted = {group.index: Holding().group_blocks(group, length) for group in found.groups}
        while pool.can_allocate(wanted):
            for group, number in wanted.items():
                pool.allocate(group, number, f"r{fitted}")
            fitted += 1
        assert fitted == count
        pool.check_integrity()


def test_a_stage_that_stores_nothing_is_named_and_does_not_count():
    plan = planned("microsoft/Phi-4-mini-flash-reasoning", memory_bytes=1 << 34, pipeline_parallel_size=4)
    assert [bool(stage.groups) for stage in plan.stages] == [True, True, True, False]
    assert plan.stages[3].capacity is None
    assert any("stage 3 (layers 24-31) stores nothing" in warning for warning in plan.warnings)
    assert plan.tightest_stage != 3


def test_refusals_name_the_stage():
    with pytest.raises(CapacityError, match=r"pipeline stage 0 \(layers 0-25\): .* cannot hold one request"):
        planned(memory_bytes=1 << 23, pipeline_parallel_size=2)
    with pytest.raises(CapacityError, match=r"one request of max_model_len 100000 .* in stage \d \(layers"):
        planned(memory_bytes=1 << 26, pipeline_parallel_size=2, max_model_len=100000)
    with pytest.raises(ConfigError, match="pipeline_parallel_size 53 is more than the model's 52 layers"):
        planned(pipeline_parallel_size=53)
    with pytest.raises(ConfigError, match="data_parallel_size 0 must be a whole number above zero"):
        planned(data_parallel_size=0)


def test_weights_are_spread_over_tensor_and_pipeline_ranks():
    model = replace(read_model(NANO, tensor_parallel_size=2), weights_bytes=64 << 30)
    plan = planned(model, device_memory_bytes=80 << 30, pipeline_parallel_size=4, data_parallel_size=2)
    assert plan.capacity.memory_bytes == int((80 << 30) * 0.9) - (8 << 30)
    assert plan.total_ranks == 16


def test_pools_of_all_stages_are_cut_to_what_requests_can_hold():
    options = {"device_memory_bytes": 80 << 30, "pipeline_parallel_size": 2, "max_model_len": 4096, "max_num_seqs": 2}
    fitted = without_idle_blocks(planned(**options), EngineConfig.from_options(**options))
    for stage in fitted.stages:
        states, blocks = Holding().request_need(stage.groups, 4096)
        assert stage.capacity.num_blocks == stage.shape.least_blocks(2 * states, 2 * blocks)
    check_minimum(fitted)


@pytest.mark.parametrize("option", ["tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"])
def test_prepare_refuses_more_than_one_rank(option):
    with pytest.raises(ConfigError, match=f"{option} 2 can be planned, not launched: .* one device"):
        makeready.prepare(platform="cpu", **{option: 2})


def test_the_command_shows_stages_and_replicas():
    arguments = ["plan", NANO, "--platform", "cuda", "--memory", "10GiB", "--pp", "2", "--dp", "2", "--tp", "2"]
    shown = CliRunner(env={"COLUMNS": "140"}).invoke(cli, arguments)
    assert shown.exit_code == 0
    assert "2 pipeline stages, 2 replicas (8 ranks in all)" in shown.output
    rows = [line.split() for line in shown.output.splitlines() if "26-51" in line or "0-25" in line]
    assert len(rows) == 2
    assert "x 2 replicas = " in shown.output
    facts = json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).output)
    expected = makeready.plan(
        NANO, platform="cuda", memory_bytes=10 << 30, tensor_parallel_size=2, pipeline_parallel_size=2,
        data_parallel_size=2,
    )  # fmt: skip
    assert facts == json.loads(json.dumps(expected.to_dict()))
