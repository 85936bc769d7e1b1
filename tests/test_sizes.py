"""The five sizes of a plan: kernel block, block, match, checkpoint, transfer."""

from __future__ import annotations

from dataclasses import replace
from math import lcm

import pytest

import makeready
from makeready.attention_backends.interface import Capabilities
from makeready.cache.specs import MambaSpec
from makeready.config import DTYPES, LAYOUTS, EngineConfig
from makeready.hybrid.model_specs import read_model
from makeready.platforms.cuda import CUDA
from makeready.platforms.plan import Plan
from makeready.platforms.planning import plan_model
from makeready.platforms.ready import layout_of

NANO = "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"
DENSE = "Qwen/Qwen3-8B"
KERNELS = Capabilities(
    name="any", dtypes=frozenset(DTYPES), kv_cache_dtypes=frozenset(DTYPES), kernel_block_sizes=(16, 32, 64),
    layouts=LAYOUTS,
)  # fmt: skip


def planned(model=NANO, kernels=KERNELS, engine="transformers", **options) -> Plan:
    spec = read_model(model, engine=engine)
    config = EngineConfig.from_options(num_blocks=100_000, **options)
    return plan_model(spec, CUDA, {layer.layer: kernels for layer in spec.attention_layers}, config)


def test_attention_alone_matches_whole_blocks():
    sizes = planned(DENSE, block_size=96).to_dict()["sizes"]
    assert sizes["kernel_block"] == {"any": 32}
    assert (sizes["block"], sizes["match"], sizes["checkpoint"]) == (96, 96, None)
    assert sizes["state_transfer_bytes"] is None


@pytest.mark.parametrize("strategy", ["unified", "subdivided"])
def test_without_kept_states_nothing_matches(strategy):
    sizes = planned(page_strategy=strategy).to_dict()["sizes"]
    assert (sizes["match"], sizes["checkpoint"]) == (None, None)
    assert "mamba_cache_mode none keeps no state" in sizes["match_reason"]


@pytest.mark.parametrize("mode", ["align", "all"])
@pytest.mark.parametrize("strategy", ["unified", "subdivided"])
def test_a_prefix_matches_where_blocks_and_kept_states_end(mode, strategy):
    plan = planned(mamba_cache_mode=mode, page_strategy=strategy)
    sizes = plan.sizes
    assert sizes.checkpoint == plan.decision.mamba_block_size
    assert sizes.match == lcm(sizes.block, sizes.checkpoint)
    assert sizes.match % sizes.block == sizes.match % sizes.checkpoint == 0


def test_a_users_distance_between_states_is_the_match():
    plan = planned(mamba_cache_mode="align", page_strategy="subdivided", mamba_block_size=4096)
    assert (plan.sizes.block, plan.sizes.match, plan.sizes.checkpoint) == (16, 4096, 4096)


@pytest.mark.parametrize("strategy", ["unified", "subdivided"])
@pytest.mark.parametrize("order", LAYOUTS)
def test_a_transfer_moves_runs_of_bytes_that_are_there(strategy, order):
    """The runs of a block id are what its pages make of the layout: as long as can be, and all of the block."""
    plan = planned(page_strategy=strategy, layout=order)
    sizes, layout = plan.sizes, layout_of(plan, order, 100_000)
    pages = layout.block_pages()
    count, page, (_, step, one) = pages.shape[1], pages.shape[2], pages.strides
    together = count == 1 or step == page
    assert one == 1
    assert (sizes.transfer_bytes, sizes.transfer_runs) == ((count * page, 1) if together else (page, count))
    assert sizes.transfer_bytes * sizes.transfer_runs == plan.pool_bytes_per_block
    assert sizes.layout == order
    state = layout.group_pages(0)
    if strategy == "subdivided":
        assert sizes.state_transfer_bytes == state.shape[1] * state.shape[2]
    else:
        assert sizes.state_transfer_bytes == sizes.transfer_bytes
    raw = sum(x.spec.state_bytes for x in plan.model.state_layers if isinstance(x.spec, MambaSpec))
    assert strategy == "unified" or raw <= sizes.state_transfer_bytes < raw + plan.pool_bytes_per_block


def test_the_order_is_the_first_that_suits():
    two = replace(KERNELS, layouts=("HND", "cross_layer_HND"))
    assert planned(DENSE, two).sizes.layout == "HND"
    assert planned(kernels=two, page_strategy="subdivided").sizes.layout == "cross_layer_HND"
    one = replace(KERNELS, layouts=("NHD",))
    assert planned(kernels=one, page_strategy="subdivided").sizes.layout == "NHD"


@pytest.mark.parametrize("strategy", ["unified", "subdivided"])
def test_what_prepare_allocates_has_the_planned_order(strategy):
    pytest.importorskip("transformers")
    ready = makeready.prepare(platform="cpu", num_blocks=4000, backend="reference", page_strategy=strategy)
    assert ready.to_dict()["layout"] == ready.plan.sizes.layout == ready.to_dict()["sizes"]["layout"]


def test_every_size_is_explained():
    said = planned(mamba_cache_mode="align").explain()
    for size in ("kernel block", "block", "match", "checkpoint", "transfer"):
        assert f"sizes, {size}: " in said
