"""Pages of latents at multiples of some bytes, K and V of different widths, windows that keep more."""

from __future__ import annotations

import pytest

import makeready
from makeready.cache.specs import AttentionSpec
from makeready.errors import ConfigError, UnsupportedModelError
from makeready.hybrid.model_specs import read_model

KIMI = "moonshotai/Kimi-Linear-48B-A3B-Instruct"
DEEPSEEK = "deepseek-ai/DeepSeek-V3"


@pytest.mark.parametrize(
    ("alignment", "block", "dtype", "page"),
    [  # MLAAttentionSpec.page_size_bytes of vLLM 0.33.0, executed
        (512, 16, "bfloat16", 18432),
        (512, 16, "fp8_ds_mla", 10752),
        (512, 100, "bfloat16", 115200),
        (512, 100, "fp8_ds_mla", 66048),
        (576, 16, "fp8_ds_mla", 10944),
        (576, 64, "fp8_ds_mla", 42048),
        (576, 100, "bfloat16", 115200),
        (576, 256, "fp8_ds_mla", 168192),
    ],
)
def test_pages_are_rounded_as_vllm_rounds_them(alignment, block, dtype, page):
    spec = AttentionSpec(
        num_query_heads=1, num_kv_heads=1, head_size=512, head_size_v=64, dtype=dtype, mla=True,
        page_alignment=alignment,
    )  # fmt: skip
    assert spec.page_size_bytes(block) == page


def test_rounding_is_padding_in_the_plan():
    options = {"platform": "cuda", "kv_cache_dtype": "fp8_ds_mla", "num_blocks": 100}
    plan = makeready.plan(DEEPSEEK, **options, mla_page_alignment=576)
    block = plan.block_size
    page = -(-656 * block // 576) * 576
    assert plan.page_bytes == page > 656 * block
    assert plan.pool_bytes_per_block == 61 * page
    assert plan.to_dict()["groups"][0]["padding_bytes"] == 61 * (page - 656 * block)
    assert {layer.page_bytes for layer in plan.layers} == {656 * block}
    loose = makeready.plan(DEEPSEEK, **options)
    assert loose.page_bytes == 656 * loose.block_size


def test_states_are_padded_to_the_rounded_page():
    plan = makeready.plan(KIMI, platform="cuda", mla_page_alignment=4096)
    assert plan.page_bytes % 4096 == 0
    assert plan.page_bytes - 1152 * plan.block_size < 4096
    assert plan.decision.state_page_bytes == plan.page_bytes
    small = makeready.plan(KIMI, platform="cuda", mla_page_alignment=4096, page_strategy="subdivided")
    assert small.decision.attention_page_bytes % 4096 == 0
    assert small.pool_bytes_per_block % 4096 == 0


def test_heads_of_k_and_v_are_not_rounded():
    with pytest.raises(ConfigError, match="mla_page_alignment 576 rounds pages of latents"):
        makeready.plan("Qwen/Qwen3-8B", platform="cuda", mla_page_alignment=576)
    with pytest.raises(ConfigError, match="mla_page_alignment 0 must be"):
        makeready.plan(KIMI, platform="cuda", mla_page_alignment=0)


def test_deepseek_v4_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match=r"'deepseek_v4' .* blocks of several lengths"):
        makeready.plan({"model_type": "deepseek_v4"}, platform="cuda")


LLAMA = {"model_type": "llama", "hidden_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8,
         "num_key_value_heads": 2, "max_position_embeddings": 4096, "dtype": "bfloat16"}  # fmt: skip


def test_v_may_be_narrower_than_k():
    spec = read_model({**LLAMA, "head_dim": 192, "v_head_dim": 128}).attention_layers[0].spec
    assert (spec.head_size, spec.head_size_v) == (192, 128)
    assert spec.bytes_per_token == 2 * (192 + 128) * 2
    with pytest.raises(ConfigError, match="nvfp4 packs heads of K and V alike, and they are 192 and 128 wide"):
        read_model({**LLAMA, "head_dim": 192, "v_head_dim": 128}, kv_cache_dtype="nvfp4")


def test_windows_may_keep_tokens_below_them():
    """ceil((window - 1 + extra + in flight) / block) + 1, vLLM's cap."""
    options = {"platform": "cuda", "free_out_of_window": True, "max_num_batched_tokens": 512}
    plain, kept = (makeready.plan("openai/gpt-oss-20b", **options, extra_retained_tokens=n) for n in (0, 100))
    window = next(group for group in plain.groups if group.kind == "sliding")
    assert plain.holding.group_blocks(window, 8192) == -(-(127 + 512) // plain.block_size) + 1
    assert kept.holding.group_blocks(window, 8192) == -(-(127 + 100 + 512) // plain.block_size) + 1


def test_cpus_on_which_vllm_resets_recurrent_states_are_minded():
    said = makeready.plan("Qwen/Qwen3-Next-80B-A3B-Instruct", platform="cpu").warnings
    assert any("recurrent states are planned in bfloat16; on a CPU with AVX512-BF16" in words for words in said)
    for options in ({"mamba_ssm_cache_dtype": "float32"}, {"mamba_ssm_cache_dtype": "bfloat16"}):
        said = makeready.plan("Qwen/Qwen3-Next-80B-A3B-Instruct", platform="cpu", **options).warnings
        assert not any("AVX512" in words for words in said)
    assert any("AVX512" in words for words in makeready.plan("ai21labs/Jamba-v0.1", platform="cpu").warnings)
    assert not any("AVX512" in words for words in makeready.plan("ai21labs/Jamba-v0.1", platform="cuda").warnings)
