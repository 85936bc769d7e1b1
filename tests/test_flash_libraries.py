"""What each provider passes to its library, against slow PyTorch with the library's signature; and every refusal.

No kernel of a library is tested here: docs/flash.md says where each one was run.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from flash_library import aten_flash_attention, flash_attention_3, flash_attention_4, xpu_kernels
from makeready.attention_backends.flash import FlashBackend
from makeready.attention_backends.flash.flash_attention_3 import FlashAttention3
from makeready.attention_backends.flash.flash_attention_4 import FlashAttention4
from makeready.attention_backends.flash.one_call import OneCallAttention
from makeready.attention_backends.flash.torch_varlen import LEAST_TORCH, TorchVarlen
from makeready.attention_backends.flash.xpu_kernels import XpuKernels
from makeready.attention_backends.installed import release
from makeready.attention_backends.interface import AttentionCall, BuildRequest
from makeready.attention_backends.reference.impl import ReferenceAttention
from makeready.cache.specs import AttentionSpec
from makeready.config import AttentionConfig
from makeready.device import DeviceFacts
from makeready.errors import BackendError
from paged_cases import make_case

CPU = DeviceFacts(platform="cpu", device_type="cpu")
HOPPER = DeviceFacts(platform="cuda", device_type="cuda", name="H200", compute_capability=(9, 0))


def device_of(*capability):
    return replace(HOPPER, compute_capability=capability)


VERSIONS = {"flash-attn-3": "3.0.0", "flash-attn-4": "4.0.0b36", "torch": "2.13.0", "vllm-xpu-kernels": "0.1.16"}
FUNCTIONS = {
    "flash_attn_with_kvcache": flash_attention_3,
    ("flash_attn.cute", "flash_attn_varlen_func"): flash_attention_4,
    ("vllm_xpu_kernels.flash_attn_interface", "flash_attn_varlen_func"): xpu_kernels,
    "varlen_attn": lambda *given, scale, window_size, enable_gqa, seqused_k, block_table: None,
    "FA2_AVAILABLE": True,
    ("torch.version", "cuda"): "13.0",
}


def installed(provider_type, versions=VERSIONS, functions=FUNCTIONS):
    def load(module, name):
        found = functions.get((module, name), functions.get(name))
        if isinstance(found, Exception):
            raise found
        return found

    return provider_type(version_of=versions.get, load=load, found=lambda module: True)


def absent(provider_type):
    return provider_type(version_of=lambda name: None, load=None, found=lambda module: False)


def request_for(device=CPU, *, block_size=64, dtype="bfloat16", soft_cap=None, sinks=False, layout="NHD", **given):
    heads = {"num_query_heads": 4, "num_kv_heads": 2, "head_size": 64, "head_size_v": 64, "dtype": dtype, **given}
    return BuildRequest(
        device=device, spec=AttentionSpec(**heads), dtype=dtype, block_size=block_size, kernel_block_size=block_size,
        num_blocks=8, max_num_seqs=2, max_num_batched_tokens=64, max_model_len=256, config=AttentionConfig(),
        soft_cap=soft_cap, sinks=sinks, layout=layout,
    )  # fmt: skip


def needs_block_tables():
    """torch's front end takes a block table since 2.12."""
    if release(torch.__version__) < LEAST_TORCH:
        pytest.skip(f"torch {torch.__version__} has no block table in varlen_attn")


@pytest.fixture
def aten_kernel():
    """A CPU kernel under torch's own varlen front end; gone after the test."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", aten_flash_attention, "CPU")
    yield
    library._destroy()


@pytest.fixture(params=[FlashAttention3, FlashAttention4, TorchVarlen, XpuKernels])
def provider(request):
    if request.param is not TorchVarlen:
        return installed(request.param)
    needs_block_tables()
    request.getfixturevalue("aten_kernel")
    return TorchVarlen(version_of=VERSIONS.get)


def attention_of(provider, block_size=256):
    return OneCallAttention(
        lambda call: provider.attend(provider._load(provider.module, provider.function), call),
        provider=provider.name,
        capturable=False,
        reads_unwritten_slots=False,
        block_size=block_size,
    )


CALLS = {
    "causal": AttentionCall(scale=0.3),
    "window": AttentionCall(scale=0.3, sliding_window=5),
    "window of one": AttentionCall(scale=0.3, sliding_window=1),
    "no mask": AttentionCall(scale=0.3, causal=False),
    "soft cap": AttentionCall(scale=0.3, soft_cap=1.5),
    "sinks": AttentionCall(scale=0.3, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("seq_lens", "query_lens"), [((300, 7, 40), (1, 1, 1)), ((300, 7, 40), (130, 1, 40))])
def test_what_is_passed_gives_what_the_reference_gives(provider, name, seq_lens, query_lens):
    can, call = provider.constraints(CPU), CALLS[name]
    if (call.soft_cap and not can.soft_cap) or (call.sinks is not None and not can.sinks):
        pytest.skip(f"{provider.name} declares no {name}")
    block_size = max(16, can.kernel_block_multiple)
    case = make_case(seq_lens, query_lens, block_size=block_size, clear=False, heads=(4, 2), head_size=16)
    attention = attention_of(provider)
    found = attention.forward(case.query, case.key_cache, case.value_cache, attention.prepare(case.step), call)
    expected = ReferenceAttention().forward(case.query, case.key_cache, case.value_cache, case.step, call)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_scales_of_k_and_v_are_folded_in_and_slopes_refused(provider):
    case = make_case((70, 9), (3, 9), block_size=256, heads=(4, 2), head_size=16)
    attention, call = attention_of(provider), AttentionCall(scale=0.2, key_scale=0.5, value_scale=3.0)
    prepared = attention.prepare(case.step)
    found = attention.forward(case.query, case.key_cache, case.value_cache, prepared, call)
    expected = ReferenceAttention().forward(
        case.query, case.key_cache, case.value_cache, case.step, AttentionCall(scale=0.1)
    )
    torch.testing.assert_close(found, 3 * expected, rtol=1e-5, atol=1e-5)
    slopes = AttentionCall(scale=0.2, alibi_slopes=torch.ones(4))
    with pytest.raises(BackendError, match="is not asked for ALiBi, and the layer has slopes"):
        attention.forward(case.query, case.key_cache, case.value_cache, prepared, slopes)


def test_gathered_keys_wider_than_values_are_served_too(provider):
    case = make_case((70, 9), (3, 9), heads=(4, 4), head_size=24, head_size_v=16)
    attention, call = attention_of(provider), AttentionCall(scale=0.2)
    found = attention.forward_gathered(case.query, case.keys, case.values, case.step, call)
    expected = ReferenceAttention().forward_gathered(case.query, case.keys, case.values, case.step, call)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_step_without_tokens_is_served_without_a_call(provider):
    case = make_case((5,), (1,), head_size=16)
    attention = attention_of(provider)
    empty = replace(case.step, query_lens_host=(), seq_lens_host=())
    found = attention.forward(
        case.query[:0], case.key_cache, case.value_cache, attention.prepare(empty), AttentionCall(scale=1.0)
    )
    assert found.shape == (0, 4, 16)


@pytest.mark.parametrize("provider_type", [FlashAttention3, FlashAttention4, XpuKernels])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_a_build_is_checked_against_the_reference_in_the_cache_s_own_layout(provider_type, layout):
    provider = installed(provider_type)
    if layout not in provider.constraints(CPU).layouts:
        with pytest.raises(BackendError, match=f"reads pages in NHD, cross_layer_NHD, not {layout}"):
            provider.build(request_for(layout=layout))
        return
    attention = provider.build(request_for(soft_cap=3.0, sliding_window=9, layout=layout))
    assert attention.name == "flash"
    assert attention.provider == provider.name


def test_a_library_that_sums_wrong_is_found_at_build_time():
    def wrong(*arguments, **named):
        return flash_attention_3(*arguments, **{**named, "softmax_scale": 1.0})

    wrong.__wrapped__ = flash_attention_3  # the signature that is asked for
    provider = installed(FlashAttention3, functions={"flash_attn_with_kvcache": wrong})
    with pytest.raises(BackendError, match="flash by fa3 failed its self-check on cpu: decode differs"):
        provider.build(request_for())


@pytest.mark.parametrize("provider_type", [FlashAttention3, FlashAttention4, TorchVarlen, XpuKernels])
def test_what_is_not_installed_says_how_to_get_it(provider_type):
    probe = absent(provider_type).probe(HOPPER)
    assert not probe.available
    assert probe.reason == f"{provider_type.title} is not installed ({provider_type.install})"


@pytest.mark.parametrize(
    ("provider", "device", "reason"),
    [
        (installed(FlashAttention3), device_of(10, 0), "compute capability 9.x, and this device has 10.0"),
        (installed(FlashAttention4), device_of(8, 0), "9.x, 10.x, 11.x, and this device has 8.0"),
        (installed(TorchVarlen), device_of(7, 5), "and this device has 7.5"),
        (installed(TorchVarlen, {"torch": "2.11.0"}), HOPPER, "from torch 2.12 on, and torch 2.11.0 is installed"),
        (
            installed(TorchVarlen, functions={("torch.version", "cuda"): None}),
            HOPPER,
            "torch's varlen attention has no kernels in torch 2.13.0, which is built without CUDA",
        ),
        (
            installed(FlashAttention3, functions={"flash_attn_with_kvcache": OSError("libcudart.so.13: cannot open")}),
            HOPPER,
            "FlashAttention 3 3.0.0 does not load: OSError: libcudart.so.13: cannot open",
        ),
        (
            installed(FlashAttention4, functions={"flash_attn_varlen_func": lambda q, k, v, causal=False: q}),
            HOPPER,
            "FlashAttention 4 4.0.0b36 has a flash_attn_varlen_func without cu_seqlens_q, max_seqlen_q",
        ),
        (
            installed(XpuKernels, functions={"FA2_AVAILABLE": False, "FA2_UNAVAILABLE_REASON": "libze.so.1: no"}),
            CPU,
            "vllm-xpu-kernels 0.1.16 does not load: libze.so.1: no",
        ),
    ],
)  # fmt: skip
def test_every_obstacle_is_a_sentence(provider, device, reason):
    probe = provider.probe(device)
    assert not probe.available
    assert reason in probe.reason
    with pytest.raises(BackendError, match=re.escape(reason)):
        provider.build(request_for(device))


@pytest.mark.parametrize(
    ("provider_type", "given", "reason"),
    [
        (FlashAttention3, {"sinks": True}, "fa3 has no attention sinks"),
        (FlashAttention3, {"dtype": "float32"}, "fa3 computes in bfloat16, float16, and the layer in float32"),
        (FlashAttention3, {"head_size": 512, "head_size_v": 512}, "fa3 serves head sizes up to 256"),
        (TorchVarlen, {"block_size": 528}, "varlen reads blocks of a multiple of 256 tokens, not 528"),
        (TorchVarlen, {"block_size": 256, "soft_cap": 2.0}, "varlen has no soft cap, and the layer's is 2.0"),
        (XpuKernels, {"block_size": 80}, "xpu-kernels reads blocks of a multiple of 64 tokens, not 80"),
        (XpuKernels, {"sliding_window": 1}, "xpu-kernels takes a sliding window of 1 for none"),
        (FlashAttention3, {"head_size_v": 32}, "fa3 takes one head size, and the layer's K have 64 and its V 32"),
        (XpuKernels, {"head_size": 80, "head_size_v": 80}, "xpu-kernels serves head sizes 64, 96, 128"),
    ],
)
def test_a_request_outside_the_constraints_is_refused_with_the_numbers(provider_type, given, reason):
    with pytest.raises(BackendError, match=re.escape(reason)):
        installed(provider_type).build(request_for(**given))


def test_pages_that_are_no_whole_number_of_tokens_are_refused_on_xpu():
    provider = installed(XpuKernels)
    case = make_case((20,), (1,), block_size=64, head_size=16)
    odd = torch.empty(10 * case.key_cache.numel()).as_strided(case.key_cache.shape, (64 * 64 + 8, 64, 16, 1))
    attention = attention_of(provider)
    with pytest.raises(BackendError, match="multiple of a token's, 64 elements; it is 4104"):
        attention.forward(case.query, odd, odd, attention.prepare(case.step), AttentionCall(scale=1.0))


def test_automatic_choice_takes_the_first_that_can_serve_and_the_asked_one_or_none():
    three, four = installed(FlashAttention3), installed(FlashAttention4)
    three.device_types = four.device_types = frozenset({"cpu"})
    flash = FlashBackend([three, four])
    assert flash.build(request_for()).provider == "fa3"
    assert flash.build(request_for(sinks=True)).provider == "fa4"
    asked = replace(request_for(), config=AttentionConfig(flash_provider="fa4"))
    assert flash.build(asked).provider == "fa4"
    with pytest.raises(BackendError, match="fa3: fa3 has no attention sinks"):
        flash.build(replace(request_for(sinks=True), config=AttentionConfig(flash_provider="fa3")))
    with pytest.raises(BackendError, match="'fa5' is not known; for cpu there are fa3, fa4"):
        flash.build(replace(request_for(), config=AttentionConfig(flash_provider="fa5")))


def test_automatic_choice_passes_over_fa4_where_it_cannot_split():
    flash = FlashBackend([installed(FlashAttention4)])
    with pytest.raises(BackendError, match=r"only when asked: its kernels for compute capability 9\.x do not split"):
        flash.build(request_for(HOPPER))
    assert not flash.probe(HOPPER).available
    assert FlashBackend(flash.providers, asked="fa4").probe(HOPPER).available
    (facts,) = flash.providers_on(HOPPER)
    assert facts.available
    assert "taken only when asked: its kernels for compute capability 9.x" in facts.constraints


def test_batch_invariance_is_refused_by_libraries_that_do_not_promise_it():
    asked = replace(request_for(), config=AttentionConfig(batch_invariant=True))
    with pytest.raises(BackendError, match="batch_invariant is asked, and the output of fa3 depends on the batch"):
        installed(FlashAttention3).build(asked)
