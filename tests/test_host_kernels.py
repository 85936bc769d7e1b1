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
        (KIMI, "cuda", "nvfp4_ds_mla", "flashinfer_mla", 352),
    ],
)
def test_quantised_caches_are_planned_with_the_kernels_that_store_them(model, platform, dtype, backend, per_token):
    facts = makeready.plan(model, platform=platform, kv_cache_dtype=dtype).to_dict()
    assert {layer["backend"] for layer in facts["layers"]} == {backend, None}
    assert facts["attention_bytes_per_token"] == per_token
    assert facts["attention_page_bytes"] >= facts["state_raw_bytes"]
    assert facts["block_size"] % facts["kernel_block_sizes"][backend] == 0


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
