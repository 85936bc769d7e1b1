"""Several KV dtypes in one pool: which layers keep the model's, what pages that makes, and what is allocated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from makeready.attention_backends.interface import Capabilities
from makeready.cache.allocation import allocate
from makeready.cache.capacity import Holding
from makeready.cache.group_pool import pool_for
from makeready.cache.specs import AttentionSpec
from makeready.cli import cli, main
from makeready.config import DTYPES, KV_CACHE_DTYPES, LAYOUTS, EngineConfig
from makeready.errors import CapacityError, ConfigError
from makeready.hybrid.model_specs import read_model
from makeready.platforms.cuda import CUDA
from makeready.platforms.plan import Plan
from makeready.platforms.planning import plan_model
from makeready.platforms.ready import layout_of

NANO = "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"
DENSE = "Qwen/Qwen3-8B"
KERNELS = Capabilities(
    name="any", dtypes=frozenset(DTYPES), kv_cache_dtypes=frozenset(KV_CACHE_DTYPES), kernel_block_multiple=16,
    layouts=LAYOUTS, sliding_window=True,
)  # fmt: skip


def read(model, skip, stored="fp8", engine="transformers"):
    return read_model(model, engine=engine, kv_cache_dtype=stored, kv_cache_dtype_skip_layers=skip)


def planned(model, skip, stored="fp8", engine="transformers", **options) -> Plan:
    spec = read(model, skip, stored, engine) if isinstance(model, str) else model
    config = EngineConfig.from_options(kv_cache_dtype=stored, kv_cache_dtype_skip_layers=skip, **options)
    return plan_model(spec, CUDA, {layer.layer: KERNELS for layer in spec.attention_layers}, config)


def test_skipped_layers_keep_the_models_dtype():
    model = read(NANO, (5, 12))
    assert {layer.layer: layer.spec.dtype for layer in model.attention_layers} == {
        5: "bfloat16", 12: "bfloat16", 19: "fp8_e4m3", 26: "fp8_e4m3", 33: "fp8_e4m3", 42: "fp8_e4m3",
    }  # fmt: skip
    assert model.kv_cache_dtype == "fp8_e4m3"
    assert read(NANO, ()).layers == read_model(NANO, kv_cache_dtype="fp8").layers
    facts = planned(model, (5, 12)).to_dict()
    assert [x["kv_cache_dtype"] for x in facts["layers"] if x["layer"] in (0, 5, 19)] == [None, "bfloat16", "fp8_e4m3"]


def test_windows_and_latents_are_skipped_too():
    windowed = read("openai/gpt-oss-20b", (0, 1))
    assert [layer.spec.dtype for layer in windowed.attention_layers[:3]] == ["bfloat16", "bfloat16", "fp8_e4m3"]
    latent = read("moonshotai/Kimi-Linear-48B-A3B-Instruct", (3,))
    assert [layer.spec.dtype for layer in latent.attention_layers[:2]] == ["bfloat16", "fp8_e4m3"]


@pytest.mark.parametrize("skip", [(0,), (5, 99), (-1,)])
def test_a_layer_without_attention_is_refused_with_those_that_have_it(skip):
    with pytest.raises(ConfigError, match=r"kv_cache_dtype_skip_layers names .*; attention layers are 5, 12, 19, 26"):
        read(NANO, skip)


def test_a_model_without_attention_has_nothing_to_skip():
    mamba = {"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 1, "expand": 2, "state_size": 4,
             "conv_kernel": 4, "dtype": "float32"}  # fmt: skip
    with pytest.raises(ConfigError, match="it has no attention layers"):
        read(mamba, (0,))


@pytest.mark.parametrize("value", ["0,5", (0, "5"), (1.0,), (True,), 5])
def test_a_setting_that_is_no_list_of_layers_is_refused(value):
    with pytest.raises(ConfigError, match="kv_cache_dtype_skip_layers .* must be layer indices"):
        EngineConfig.from_options(kv_cache_dtype_skip_layers=value)


def test_skipping_without_another_dtype_is_said_to_change_nothing():
    assert any("changes nothing" in note for note in read(NANO, (5,), stored="auto").notes)


def test_unified_pads_narrow_pages_and_says_so():
    plan = planned(NANO, (5, 12), page_strategy="unified")
    size = plan.block_size
    assert plan.page_bytes == 1024 * size
    assert {layer.page_bytes for layer in plan.layers if layer.backend} == {1024 * size, 512 * size}
    empty = 1 - (2 * 1024 + 4 * 512) / (6 * 1024)
    assert any(f"empty by {empty:.1%}" in warning for warning in plan.warnings)
    assert any(f"4 x fp8_e4m3 fill {512 * size} bytes, padded by {512 * size}" in reason for reason in plan.reasons)


def test_unified_is_refused_where_more_than_half_would_be_empty():
    with pytest.raises(CapacityError, match=r"would leave 59.9% of them empty, more than half: 1 x bfloat16 .* nvfp4"):
        planned(NANO, (5,), "nvfp4", page_strategy="unified")
    few = planned(NANO, (5, 12, 19, 26), "nvfp4", page_strategy="unified")
    assert few.strategy.name == "unified"


@pytest.mark.parametrize("skip", [(5, 12), (5,), (5, 12, 19), (5, 12, 19, 26, 33)])
def test_subdivided_blocks_hold_layers_of_several_widths(skip):
    plan = planned(NANO, skip, page_strategy="subdivided")
    pages = {layer: group["page_bytes"] for group in plan.to_dict()["groups"][1:] for layer in group["layers"]}
    assert pages == {layer: plan.block_size * (1024 if layer in skip else 512) for layer in (5, 12, 19, 26, 33, 42)}
    attention = [group for group in plan.groups if not group.is_state]
    filled = sum(len(group.layers) * pages[group.layers[0].layer] for group in attention)
    assert filled >= 7 / 8 * len(attention) * plan.strategy.shape.block_bytes
    other = planned(NANO, skip, page_strategy="unified")
    assert plan.strategy.waste_estimate < other.strategy.waste_estimate
    assert planned(NANO, skip).strategy == plan.strategy


def test_where_no_strategy_suits_both_are_named():
    one_each = replace(read(DENSE, (0,), "nvfp4"), layers=read(DENSE, (0,), "nvfp4").layers[:4])
    with pytest.raises(CapacityError, match="no page strategy suits: page_strategy unified .*; and page_strategy sub"):
        planned(one_each, (0,), "nvfp4")
    with pytest.raises(CapacityError, match=r"pipeline stage 0 \(layers 0-17\): page_strategy subdivided finds no"):
        planned(one_each, (0,), "nvfp4", page_strategy="subdivided", pipeline_parallel_size=2)


def test_models_of_attention_only_may_subdivide_then():
    plan = planned(DENSE, (0, 35), num_blocks=4096)
    assert plan.strategy.name == "subdivided"
    assert plan.strategy.waste_estimate < 0.05
    assert planned(DENSE, (0, 35), page_strategy="unified", num_blocks=4096).strategy.waste_estimate > 0.4
    with pytest.raises(ConfigError, match="subdivided is refused: .* stores only attention"):
        planned(DENSE, (), page_strategy="subdivided")


@pytest.mark.parametrize("order", ["cross_layer_NHD", "cross_layer_HND"])
@pytest.mark.parametrize("strategy", ["unified", "subdivided"])
@pytest.mark.parametrize(("name", "skip"), [(NANO, (5, 12)), (NANO, (5,)), (DENSE, (0, 5, 7)), (DENSE, (35,))])
def test_allocated_and_handed_out_as_planned(name, skip, strategy, order):
    spec = replace(read(name, skip), max_model_len=200)
    kept = tuple(layer for layer in spec.layers if not layer.is_state or layer.layer < 5)
    spec = replace(spec, layers=kept)
    sizes = planned(spec, skip, page_strategy=strategy, num_blocks=1 << 20)
    states, blocks = Holding().request_need(sizes.groups, 200)
    least = sizes.strategy.shape.least_blocks(2 * states, 2 * blocks)
    plan = planned(spec, skip, page_strategy=strategy, num_blocks=least)
    layout = layout_of(plan, order, least)
    cache = allocate(layout, torch.device("cpu"))
    assert cache.buffer.nbytes == least * plan.pool_bytes_per_block == plan.capacity.memory_bytes
    check_views(plan, cache)
    for length, count in plan.capacity.concurrency.items():
        pool, fitted = pool_for(layout), 0
        need = {group.index: Holding().group_blocks(group, length) for group in plan.groups}
        while pool.can_allocate(need):
            for group, number in need.items():
                pool.allocate(group, number, f"r{fitted}")
            fitted += 1
        assert fitted == count
        pool.check_integrity()


def check_views(plan, cache):
    """Every layer has its own dtype and its own bytes: what one writes into a block no other layer of it sees."""
    for planned_layer, layer in zip(plan.layers, plan.model.layers, strict=True):
        if isinstance(layer.spec, AttentionSpec):
            views = cache.key_value(layer.layer)
            assert {str(view.dtype).removeprefix("torch.").replace("float8_e4m3fn", "fp8_e4m3") for view in views} == {
                planned_layer.kv_cache_dtype
            }
            assert sum(view[0].numel() * view.element_size() for view in views) == planned_layer.page_bytes
    for group in plan.groups:
        if group.is_state:
            continue
        cache.buffer.zero_()
        for position, layer in enumerate(group.layers, start=1):
            for view in cache.key_value(layer.layer):
                view[1].fill_(position)
        for position, layer in enumerate(group.layers, start=1):
            for view in cache.key_value(layer.layer):
                assert (view[1].float() == position).all()
                assert (view[0].float() == 0).all()


def test_the_command_takes_a_list_of_layers(capsys):
    arguments = ["plan", NANO, "--platform", "cuda", "--engine", "transformers", "--kv-cache-dtype", "fp8"]
    shown = CliRunner().invoke(cli, [*arguments, "--kv-cache-dtype-skip-layers", "5, 12"])
    assert shown.exit_code == 0
    assert "subdivided" in shown.output
    for text, words in (("0,x", "'0,x' is no list of layers"), ("0", "attention layers are 5, 12")):
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "--kv-cache-dtype-skip-layers", text])
        assert stopped.value.code == 2
        assert words in capsys.readouterr().err
