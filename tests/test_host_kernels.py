"""Caches that only a host engine's kernels store: planned for, with their blocks, and refused where something runs."""

from __future__ import annotations

import pytest

import makeready
from makeready.attention_backends.host_kernels import vllm_backends
from makeready.device import DeviceFacts
from makeready.errors import BackendError, BlockSizeError, ConfigError

NANO = "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"
KIMI = "moonshotai/Kimi-Linear-48B-A3B-Instruct"


@pytest.mark.parametrize(
    ("model", "platform", "dtype", "backend", "per_token"),
    [
        (NANO, "cuda", "nvfp4", "flashinfer", 2 * 2 * (64 + 8)),
        (NANO, "cuda", "int8_per_token_head", "triton_attn", 2 * (256 + 8)),
        (NANO, "xpu", "int4_per_token_head", "triton_attn", 2 * (128 + 8)),
        (KIMI, "cuda", "fp8", "flashmla", 576),
        (KIMI, "xpu", "fp8", "triton_mla", 576),
        (KIMI, "cuda", "fp8_ds_mla", "flashmla", 656),
    ],
)
def test_quantised_caches_are_planned_with_the_kernels_that_store_them(model, platform, dtype, backend, per_token):
    facts = makeready.plan(model, platform=platform, kv_cache_dtype=dtype).to_dict()
    assert {layer["backend"] for layer in facts["layers"]} == {backend, None}
    assert facts["attention_bytes_per_token"] == per_token
    assert facts["attention_page_bytes"] >= facts["state_raw_bytes"]
    assert facts["block_size"] % facts["kernel_block_sizes"][backend] == 0


def test_packed_latents_without_states():
    facts = makeready.plan("deepseek-ai/DeepSeek-V3", platform="cuda", kv_cache_dtype="nvfp4_ds_mla").to_dict()
    assert facts["attention_bytes_per_token"] == 352
    assert facts["kernel_block_sizes"] == {"flashinfer_mla": 32}


@pytest.mark.parametrize(
    ("model", "backend", "dtype", "kernel"),
    [
        (NANO, "flashinfer_trtllm", "nvfp4", 256),
        (KIMI, "cutlass_mla", "auto", 128),
        (KIMI, "tokenspeed_mla", "fp8", 64),
        ("google/gemma-3-27b-it", "flashinfer_trtllm", "auto", 16),
    ],
)
def test_kernels_of_few_devices_are_planned_by_name(model, backend, dtype, kernel):
    facts = makeready.plan(model, platform="cuda", backend=backend, kv_cache_dtype=dtype).to_dict()
    assert facts["kernel_block_sizes"] == {backend: kernel}


def test_kernels_of_few_devices_are_not_assumed():
    assert makeready.plan(KIMI, platform="cuda", kv_cache_dtype="fp8").to_dict()["kernel_block_sizes"] == {
        "flashmla": 64
    }
    with pytest.raises(BackendError, match="flash_attn_fa4_sm100 serves head sizes 256, and the layer has 128"):
        makeready.plan(NANO, platform="cuda", backend="flash_attn_fa4_sm100")


def test_fixed_pages_of_fa4_are_kernel_blocks():
    wide = {"model_type": "llama", "hidden_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 2,
            "head_dim": 256, "max_position_embeddings": 4096, "dtype": "bfloat16"}  # fmt: skip
    assert makeready.plan(wide, platform="cuda", backend="flash_attn_fa4_sm100").block_size == 128
    wider = {**wide, "head_dim": 512}
    plan = makeready.plan(wider, platform="cuda", backend="flash_attn_fa4_sm90", kv_cache_dtype="fp8")
    assert plan.block_size == 64


def test_what_makeready_stores_itself_is_chosen_first():
    assert makeready.plan(NANO, platform="cuda").to_dict()["kernel_block_sizes"].keys() == {"flash"}
    assert makeready.plan(NANO, platform="cuda", backend="triton_attn").block_size == 2096


def test_an_exact_block_that_cannot_hold_a_state_is_refused_with_both_owners():
    with pytest.raises(BlockSizeError, match="cpu_mla"):
        makeready.plan(KIMI, platform="cpu", backend="cpu_mla")


def test_kernels_for_latents_do_not_serve_heads():
    with pytest.raises(BackendError, match=r"flashmla serves latent attention \(MLA\) only"):
        makeready.plan(NANO, platform="cuda", backend="flashmla")
    with pytest.raises(ConfigError, match="fp8_ds_mla packs the latent of MLA layers"):
        makeready.plan(NANO, platform="cuda", kv_cache_dtype="fp8_ds_mla")


def test_other_engines_and_startup_do_not_know_them():
    with pytest.raises(BackendError, match="'flashinfer' is not known on cuda"):
        makeready.plan(NANO, platform="cuda", backend="flashinfer", engine="transformers")
    with pytest.raises(BackendError, match="'triton_attn' is not known on cpu"):
        makeready.prepare(platform="cpu", backend="triton_attn")


def test_none_claims_to_run():
    device = DeviceFacts(platform="cuda", device_type="cuda")
    for backend in vllm_backends():
        assert not backend.probe(device).available
        assert "planned for, not run" in backend.probe(device).reason
