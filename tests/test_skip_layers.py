"""Layers that keep the model's dtype under engine vLLM: phase 3, against answers of vLLM 0.33.0's planning code."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

import makeready
from makeready.attention_backends.interface import Capabilities
from makeready.cache.allocation import allocate
from makeready.config import EngineConfig
from makeready.errors import BlockSizeError, CapacityError, ConfigError, MakereadyError
from makeready.hybrid.model_specs import read_model
from makeready.platforms.cpu import CPU
from makeready.platforms.cuda import CUDA
from makeready.platforms.plan import Plan
from makeready.platforms.planning import plan_model
from makeready.platforms.ready import layout_of

CASES = Path(__file__).parent / "data" / "skip_layer_cases.json.gz"
NANO = "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"
"""6 attention layers of 1024 bytes a token in bf16; 23 states of 2134016 bytes."""


def cases():
    return json.loads(gzip.decompress(CASES.read_bytes()))["cases"]


def kernels(case) -> Capabilities:
    multiples = [int(rule[1:]) for rule in case["kernels"] if isinstance(rule, str)]
    return Capabilities(
        name="kernels",
        dtypes=frozenset(),
        kv_cache_dtypes=frozenset(),
        kernel_block_multiple=multiples[0] if multiples else 1,
        kernel_block_sizes=tuple(rule for rule in case["kernels"] if not isinstance(rule, str)),
    )


def planned_case(case) -> Plan:
    model = read_model(
        case["model"],
        engine="vllm",
        tensor_parallel_size=case["tp"],
        kv_cache_dtype=case["kv_cache_dtype"],
        kv_cache_dtype_skip_layers=case["skip"],
    )
    config = EngineConfig.from_options(mamba_cache_mode=case["mode"], tensor_parallel_size=case["tp"])
    backend = kernels(case)
    return plan_model(
        model,
        CPU if case["platform"] == "cpu" else CUDA,
        {layer.layer: backend for layer in model.attention_layers},
        config,
        preferred_block_sizes={"kernels": case["preferred"]},
    )


def test_every_case_is_planned_or_refused_as_vllm_does():
    """Blocks, groups with their block sizes, and bytes per block id; where vLLM dies, a refusal with the reason."""
    found = cases()
    different, refused = [], 0
    for number, case in enumerate(found):
        try:
            plan = planned_case(case)
        except CapacityError as error:
            refused += 1
            if not case["error"]:
                different.append((number, str(error)))
            continue
        theirs = case["output"]
        ours = {
            "block_size": plan.block_size,
            "mamba_block_size": plan.decision.mamba_block_size,
            "pool": plan.pool_bytes_per_block,
            "groups": sorted(([x.layer for x in group.layers], group.block_size) for group in plan.groups),
        }
        groups = sorted((sorted(g["layers"]), g["block_size"]) for g in (theirs or {}).get("groups", ()))
        if theirs is None or ours != {**theirs, "groups": groups}:
            different.append((number, case["error"] or ours))
    assert different == []
    assert len(found) == 1967
    assert refused == sum(case["error"] is not None for case in found) == 49


def vllm(*skip, stored="fp8", model=NANO, **options):
    return makeready.plan(model, platform="cuda", kv_cache_dtype=stored, kv_cache_dtype_skip_layers=skip, **options)


def test_quantised_layers_get_longer_blocks_and_states_the_wider_page():
    """Phase 2 sizes blocks for fp8, 512 bytes a token; then the bf16 page is the larger one."""
    plan = vllm(5, 12)
    size = 16 * -(-2134016 // (16 * 512))
    assert plan.block_size == size == 4176
    assert plan.page_bytes == size * 1024 == plan.decision.mamba_page_size_padded
    blocks = {layer.layer: group.block_size for group in plan.groups for layer in group.layers}
    assert {blocks[5], blocks[12]} == {size}
    assert {blocks[19], blocks[26]} == {2 * size}
    assert {layer.page_bytes for layer in plan.layers if layer.backend} == {plan.page_bytes}
    assert any("blocks: bfloat16 4176 tokens; fp8_e4m3 8352 tokens, 2 times as long." in why for why in plan.reasons)
    assert plan.sizes.match is None
    kept = vllm(5, 12, mamba_cache_mode="align")
    assert kept.sizes.match == 2 * size


def test_pages_that_do_not_divide_are_padded():
    plan = vllm(5, stored="nvfp4")
    wide = plan.block_size * 1024
    narrow = plan.block_size * 288
    assert plan.page_bytes == wide
    assert wide % narrow
    assert any(f"nvfp4 {plan.block_size} tokens and padded by {wide - narrow} bytes" in why for why in plan.reasons)


def test_small_blocks_grow_until_a_quantised_page_covers_a_kernel_block():
    plan = vllm(0, 35, model="Qwen/Qwen3-8B")
    assert plan.decision.phase1_block_size == 16
    assert plan.block_size == 32
    assert any("phase 3: a kernel block of the layers that keep the model's dtype needs" in why for why in plan.reasons)


def test_layers_of_full_attention_alone_share_one_group_and_keep_their_pages():
    plan = vllm(0, 35, model="Qwen/Qwen3-8B", num_blocks=100)
    assert len(plan.groups) == 1
    per_token = 2 * 4096 + 34 * 2048
    assert plan.pool_bytes_per_block == 32 * per_token
    assert plan.strategy.waste_estimate == pytest.approx(1 - 1000 / 1024)
    with pytest.raises(ConfigError, match="layers of several page sizes in one block"):
        layout_of(plan, "NHD", 100)


def test_on_a_cpu_blocks_do_not_grow():
    plan = makeready.plan(
        "Qwen/Qwen3-8B", platform="cpu", backend="cpu_attn", kv_cache_dtype="fp8", kv_cache_dtype_skip_layers=(0,),
        block_size=32,
    )  # fmt: skip
    assert plan.block_size == 32
    assert not any("grows" in why for why in plan.reasons)


def test_a_users_block_is_refused_where_vllm_would_replace_it():
    with pytest.raises(BlockSizeError, match=r"block_size 16 is refused: a kernel block .* at least 32 .*nearest size"):
        vllm(0, model="Qwen/Qwen3-8B", block_size=16)
    assert vllm(0, model="Qwen/Qwen3-8B", block_size=48).block_size == 48


@pytest.mark.parametrize(
    ("model", "skip", "stored", "words"),
    [
        ("moonshotai/Kimi-Linear-48B-A3B-Instruct", (), "nvfp4_ds_mla", "vLLM cannot pad pages of latents"),
        ("moonshotai/Kimi-Linear-48B-A3B-Instruct", (3,), "fp8_ds_mla", "vLLM cannot pad pages of latents"),
        (
            "openai/gpt-oss-20b",
            (1,),
            "fp8",
            "windows in it have pages of 32768 bytes .* vLLM pads them to that already",
        ),
        (NANO, (5,), "float32", "layers in the model's dtype take 1024 bytes a token, fewer than the 2048 in float32"),
    ],
)
def test_where_vllm_dies_on_an_assertion_the_reason_is_said(model, skip, stored, words):
    spec = read_model(model, engine="vllm", kv_cache_dtype=stored, kv_cache_dtype_skip_layers=skip)
    backend = Capabilities(
        name="any", dtypes=frozenset(), kv_cache_dtypes=frozenset(), kernel_block_multiple=16, mla=True
    )
    with pytest.raises(MakereadyError, match=words):
        plan_model(spec, CUDA, {layer.layer: backend for layer in spec.attention_layers}, EngineConfig())


def test_packed_latents_are_sized_as_vllm_does():
    """Blocks are sized for 576 bytes a token, pages take 656, and states are padded to those."""
    plan = makeready.plan("moonshotai/Kimi-Linear-48B-A3B-Instruct", platform="cuda", kv_cache_dtype="fp8_ds_mla")
    raw = plan.decision.state_raw_bytes
    assert plan.block_size == 128 * -(-raw // (128 * 576))
    assert plan.page_bytes == plan.block_size * 656
    assert plan.decision.mamba_page_size_padded == plan.page_bytes


def test_windows_do_not_split_blocks():
    """Blocks that hold a state are no kernel block of FlashInfer: windows take its longest, and are padded."""
    phi = read_model("microsoft/Phi-4-mini-flash-reasoning", engine="vllm", kv_cache_dtype="fp8")
    fixed = Capabilities(name="any", dtypes=frozenset(), kv_cache_dtypes=frozenset(), kernel_block_sizes=(16, 32, 64))
    plan = plan_model(phi, CUDA, {layer.layer: fixed for layer in phi.attention_layers}, EngineConfig())
    blocks = {group.kind: group.block_size for group in plan.groups}
    assert blocks == {"mamba1": phi.max_model_len, "sliding": 64, "attention": 80}
    assert plan.page_bytes == 80 * phi.attention_layers[0].spec.bytes_per_token


def test_the_embedded_engine_pads_pages_instead():
    plan = makeready.plan(
        NANO, platform="cuda", engine="transformers", kv_cache_dtype="fp8", kv_cache_dtype_skip_layers=(5, 12),
        page_strategy="unified",
    )  # fmt: skip
    assert {group.block_size for group in plan.groups if not group.is_state} == {plan.block_size}
    assert any("are empty by" in warning for warning in plan.warnings)


def test_blocks_of_several_lengths_can_be_allocated():
    torch = pytest.importorskip("torch")
    model = read_model("Qwen/Qwen3-Next-80B-A3B-Instruct", engine="vllm", kv_cache_dtype="fp8",
                       kv_cache_dtype_skip_layers=(3, 7))  # fmt: skip
    backend = Capabilities(name="any", dtypes=frozenset(), kv_cache_dtypes=frozenset(), kernel_block_multiple=16)
    config = EngineConfig.from_options(num_blocks=40, max_model_len=4096)
    plan = plan_model(model, CUDA, {layer.layer: backend for layer in model.attention_layers}, config)
    cache = allocate(layout_of(plan, "NHD", 3), torch.device("cpu"))
    assert cache.buffer.nbytes == 3 * plan.pool_bytes_per_block
    for group in plan.groups:
        for layer in group.layers:
            if not layer.is_state:
                assert cache.key_value(layer.layer)[0].shape[1] == group.block_size
