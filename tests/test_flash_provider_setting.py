"""``--provider``: its constraints decide the block in plan and prepare alike; it is used or refused, never replaced."""

from __future__ import annotations

import json

import pytest
import torch

import makeready
from flash_library import flash_attention_3
from makeready.attention_backends.flash import backend as flash_backend
from makeready.attention_backends.flash.backend import FlashBackend
from makeready.attention_backends.flash.flash_attention_3 import FlashAttention3
from makeready.attention_backends.flash.triton_kernels.provider import TritonProvider
from makeready.attention_backends.interface import BuildRequest, LayerRequest
from makeready.cache.specs import AttentionSpec
from makeready.cli import main
from makeready.config import AttentionConfig
from makeready.device import DeviceFacts
from makeready.errors import BackendError, BlockSizeError, ConfigError
from makeready.plugins.doctor import examine
from makeready.plugins.manager import load_plugins
from makeready.startup import BUNDLED_MODEL

HYBRID = "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"


class Wide(FlashAttention3):
    """A library on the CPU that reads pages of a multiple of 48 tokens."""

    name = "wide"
    device_types = frozenset({"cpu"})

    def __init__(self):
        super().__init__(
            version_of=lambda name: "1.0", load=lambda module, name: flash_attention_3, found=lambda module: True
        )

    def constraints(self, device):
        from dataclasses import replace

        dtypes = frozenset({"bfloat16", "float32"})
        return replace(
            super().constraints(device), owner="flash by wide", kernel_block_multiple=48, dtypes=dtypes,
            kv_cache_dtypes=dtypes,
        )  # fmt: skip


@pytest.fixture
def plugins(monkeypatch):
    """The built-in plugins on a machine where flash finds that library."""
    monkeypatch.setattr(flash_backend, "default_providers", lambda: (Wide(),))
    return load_plugins(entry_points=())


def test_a_provider_s_pages_decide_the_block_on_a_device_that_is_not_here():
    free = makeready.plan(HYBRID, platform="cuda")
    narrowed = makeready.plan(HYBRID, platform="cuda", flash_provider="varlen")
    assert free.block_size % 256
    assert narrowed.block_size % 256 == 0
    assert "flash by varlen needs a multiple of 256" in narrowed.explain()
    with pytest.raises(BlockSizeError, match=r"flash by varlen needs a multiple of 256; the nearest .* 2304"):
        makeready.plan(HYBRID, platform="cuda", flash_provider="varlen", block_size=2112)


@pytest.mark.parametrize("provider", [None, "wide"])
def test_prepare_takes_the_block_that_was_planned_and_runs_the_asked_kernels(plugins, provider):
    asked = {"platform": "cpu", "flash_provider": provider, "backend": "flash", "num_blocks": 40}
    planned = makeready.plan(BUNDLED_MODEL, plugins=plugins, engine="transformers", **asked)
    ready = makeready.prepare(plugins=plugins, **asked)
    assert ready.block_size == planned.block_size
    assert ready.block_size % 48 == 0
    assert {attention.provider for attention in ready.attention.values()} == {"wide"}


def test_the_engine_generates_the_reference_s_tokens_with_a_provider(plugins):
    asked = {"num_blocks": 40, "dtype": "float32", "max_num_batched_tokens": 16}
    prompts = ("def f(x):", "import")
    from makeready.engines.transformers.records import SamplingParams

    params = SamplingParams(max_new_tokens=6)
    ours = makeready.launch(None, prompts, params, plugins=plugins, flash_provider="wide", **asked)
    reference = makeready.launch(None, prompts, params, plugins=plugins, backend="reference", **asked)
    assert [done.token_ids for done in ours] == [done.token_ids for done in reference]


def test_a_provider_means_flash_and_another_backend_beside_it_is_refused():
    planned = makeready.plan(HYBRID, platform="xpu", flash_provider="xpu-kernels")
    assert {layer.backend for layer in planned.layers} == {"flash", None}
    with pytest.raises(ConfigError, match="'fa3' is a provider of flash, and backend 'flex' is asked"):
        makeready.plan(HYBRID, platform="cuda", backend="flex", flash_provider="fa3")


@pytest.mark.parametrize(
    ("provider", "reason"),
    [
        ("fa5", "flash_provider 'fa5' is not known; for cuda there are fa3, fa4, varlen"),
        ("ipex", "flash_provider 'ipex' serves cpu, xpu, and this device is cuda"),
    ],
)
def test_a_provider_that_cannot_serve_the_device_is_refused_by_name(provider, reason):
    with pytest.raises(BackendError, match=reason):
        makeready.plan(HYBRID, platform="cuda", flash_provider=provider)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without libraries of flash kernels")
def test_a_provider_that_is_not_installed_is_refused_and_nothing_takes_its_place():
    with pytest.raises(BackendError, match="ipex: Intel Extension for PyTorch"):
        makeready.prepare(platform="cpu", flash_provider="ipex", num_blocks=40)


def test_a_layer_that_the_provider_cannot_serve_is_refused_with_both_sides():
    gpt_oss = makeready.plan("openai/gpt-oss-20b", platform="cuda")
    assert {layer.backend for layer in gpt_oss.layers} == {"flash"}
    with pytest.raises(BackendError, match="flash has no attention sinks, and the layer has them"):
        makeready.plan("openai/gpt-oss-20b", platform="cuda", flash_provider="fa3")


def test_automatic_choice_leaves_flash_where_no_installed_provider_serves_the_layer(plugins):
    odd = {"platform": "cpu", "num_blocks": 40, "dtype": "float16"}  # the library has no float16
    ready = makeready.prepare(plugins=plugins, **odd)
    assert {attention.name for attention in ready.attention.values()} != {"flash"}


def test_doctor_lists_every_provider_with_its_probe_and_constraints(plugins, capsys):
    seen = {platform["name"]: platform for platform in examine(plugins).to_dict()["platforms"]}
    (wide,) = next(backend for backend in seen["cpu"]["backends"] if backend["name"] == "flash")["providers"]
    assert (wide["name"], wide["available"]) == ("wide", True)
    assert "blocks multiples of 48" in wide["constraints"]


def test_doctor_lists_what_other_platforms_could_take(capsys):
    with pytest.raises(SystemExit):
        main(["doctor", "--json"])
    seen = {platform["name"]: platform for platform in json.loads(capsys.readouterr().out)["platforms"]}
    names = {
        platform: [provider["name"] for backend in seen[platform]["backends"] for provider in backend["providers"]]
        for platform in ("cpu", "cuda", "xpu")
    }
    assert names["cpu"][:1] == ["ipex"]
    assert names["cuda"][:3] == ["fa3", "fa4", "varlen"]
    assert names["xpu"][:2] == ["xpu-kernels", "ipex"]
    with pytest.raises(SystemExit):
        main(["doctor"])
    assert "whose kernels come from the first of these that can serve" in capsys.readouterr().out


def test_triton_refuses_more_query_heads_of_a_kv_head_than_its_fixed_tile_holds():
    spec = AttentionSpec(num_query_heads=71, num_kv_heads=1, head_size=64, head_size_v=64, dtype="bfloat16")
    request = BuildRequest(
        device=DeviceFacts(platform="cuda", device_type="cuda", compute_capability=(9, 0), compute_units=132),
        spec=spec,
        dtype="bfloat16",
        block_size=16,
        kernel_block_size=16,
        num_blocks=8,
        max_num_seqs=2,
        max_num_batched_tokens=64,
        max_model_len=128,
        config=AttentionConfig(batch_invariant=True),
    )
    with pytest.raises(
        BackendError, match="has tiles of 64 rows at head size 64 under batch_invariant, and a KV head has 71"
    ):
        TritonProvider(version=lambda: "3.6.0").build(request)


def model_of(heads, kv_heads, head_size):
    """A llama of one layer with these heads."""
    return {
        "model_type": "llama", "hidden_size": heads * head_size, "num_attention_heads": heads, "head_dim": head_size,
        "num_key_value_heads": kv_heads, "num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 64,
        "dtype": "bfloat16",
    }  # fmt: skip


def test_a_plan_knows_what_batch_invariant_tiles_hold():
    many = model_of(71, 1, 64)
    with pytest.raises(BackendError, match="triton has tiles of 64 rows at head size 64 .* has 71 query heads"):
        makeready.plan(many, platform="cuda", flash_provider="triton", batch_invariant=True)
    with pytest.raises(BackendError, match="flex_attn_block_m 64 is smaller than the 71 query heads"):
        makeready.plan(many, platform="cuda", backend="flex", batch_invariant=True)
    chosen = makeready.plan(many, platform="cuda", batch_invariant=True)
    assert chosen.layers[0].backend == "reference"
    assert any("flash cannot serve layer 0" in said and "71 query heads" in said for said in chosen.refusals)
    assert makeready.plan(many, platform="cuda", flash_provider="triton").layers[0].backend == "flash"


@pytest.mark.parametrize(("heads", "served"), [(64, True), (128, True), (129, False)])
def test_a_planned_device_of_unknown_kind_gets_the_tiles_of_the_best(heads, served):
    """Head size 256: 128 rows on Hopper, 32 on others."""
    options = {"platform": "cuda", "flash_provider": "triton", "batch_invariant": True}
    if served:
        assert makeready.plan(model_of(heads, 1, 256), **options).layers[0].backend == "flash"
    else:
        with pytest.raises(BackendError, match="tiles of 128 rows at head size 256"):
            makeready.plan(model_of(heads, 1, 256), **options)


def test_v_heads_that_the_asked_provider_does_not_read_are_refused_in_the_plan():
    device = DeviceFacts(platform="cuda", device_type="cuda", present=False)
    spec = AttentionSpec(num_query_heads=2, num_kv_heads=1, head_size=64, head_size_v=512, dtype="bfloat16")
    asked = FlashBackend().configured(AttentionConfig(flash_provider="triton"), device)
    found = asked.declared_refusals(LayerRequest(layer=0, spec=spec, dtype="bfloat16"), device)
    assert any("V's 512" in sentence for sentence in found)


def test_latents_are_refused_under_batch_invariance():
    """Kimi-Linear goes to a backend that promises it."""
    options = {"platform": "cuda", "engine": "transformers"}
    model = "moonshotai/Kimi-Linear-48B-A3B-Instruct"
    ordinary = makeready.plan(model, flash_provider="triton", **options)
    assert {layer.backend for layer in ordinary.layers if layer.backend} == {"flash"}
    with pytest.raises(BackendError, match="takes tiles of latents by how many tokens a request brings"):
        makeready.plan(model, flash_provider="triton", batch_invariant=True, **options)
