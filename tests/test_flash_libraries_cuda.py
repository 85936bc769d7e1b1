"""Providers' real kernels on a CUDA device, each skipped where its library does not load."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from makeready.attention_backends.flash import FlashBackend
from makeready.attention_backends.flash.backend import default_providers
from makeready.attention_backends.interface import AttentionCall, BuildRequest
from makeready.attention_backends.reference.impl import ReferenceAttention
from makeready.cache.specs import AttentionSpec
from makeready.config import AttentionConfig
from makeready.platforms.probing import probe_cuda
from paged_cases import make_case

pytestmark = pytest.mark.cuda
MIXED = ((300, 7, 513, 1), (130, 1, 1, 1))
DECODES = ((300, 7, 513, 1), (1, 1, 1, 1))


@pytest.fixture(scope="module")
def device():
    return probe_cuda().devices[0]


@pytest.fixture(params=["fa3", "fa4", "varlen"])
def provider(request, device):
    (found,) = (provider for provider in default_providers() if provider.name == request.param)
    probe = found.probe(device)
    if not probe.available:
        pytest.skip(probe.reason)
    return found


def build(provider, device, heads, head_size, block_size, **given):
    spec = AttentionSpec(
        num_query_heads=heads[0], num_kv_heads=heads[1], head_size=head_size, head_size_v=head_size, dtype="bfloat16"
    )
    request = BuildRequest(
        device=device, spec=spec, dtype="bfloat16", block_size=block_size, kernel_block_size=block_size, num_blocks=64,
        max_num_seqs=8, max_num_batched_tokens=512, max_model_len=4096,
        config=AttentionConfig(flash_provider=provider.name), **given,
    )  # fmt: skip
    return FlashBackend().build(request)


def check(attention, case, call):
    """Against the reference in float32, NaN wherever the kernels promise not to look."""
    found = attention.forward(case.query, case.key_cache, case.value_cache, attention.prepare(case.step), call)
    whole = [x.float() for x in (case.query, case.key_cache, case.value_cache)]
    expected = ReferenceAttention().forward(*whole, case.step, call)
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)


def blocks_of(provider, device):
    multiple = provider.constraints(device).kernel_block_multiple
    return sorted({-(-size // multiple) * multiple for size in (16, 48, 64, 128, 544, 2112)})


@pytest.mark.parametrize("lens", [DECODES, MIXED], ids=["decodes", "mixed"])
@pytest.mark.parametrize("layout", ["NHD", "cross_layer_HND"])
def test_every_block_size_in_random_places(provider, device, lens, layout):
    for block_size in blocks_of(provider, device):
        attention = build(provider, device, (8, 2), 128, block_size, layout=layout)
        case = make_case(
            *lens, block_size=block_size, heads=(8, 2), head_size=128, dtype=torch.bfloat16, layout=layout,
            clear=attention.reads_unwritten_slots, device="cuda",
        )  # fmt: skip
        check(attention, case, AttentionCall(scale=128**-0.5))


@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (7, 1), (16, 1)])
def test_every_head_size_and_group(provider, device, head_size, heads):
    if head_size > provider.constraints(device).max_head_size:
        pytest.skip(f"{provider.name} declares head sizes up to {provider.constraints(device).max_head_size} here")
    block_size = max(64, provider.constraints(device).kernel_block_multiple)
    attention = build(provider, device, heads, head_size, block_size)
    for lens in (DECODES, MIXED):
        case = make_case(
            *lens, block_size=block_size, heads=heads, head_size=head_size, dtype=torch.bfloat16,
            clear=attention.reads_unwritten_slots, device="cuda",
        )  # fmt: skip
        check(attention, case, AttentionCall(scale=head_size**-0.5))


@pytest.mark.parametrize("feature", ["sliding_window", "soft_cap", "sinks", "encoder_only"])
def test_every_feature_that_is_declared(provider, device, feature):
    can = provider.constraints(device)
    if not getattr(can, feature):
        pytest.skip(f"{provider.name} declares no {feature}")
    block_size = max(64, can.kernel_block_multiple)
    call = {
        "sliding_window": AttentionCall(scale=0.1, sliding_window=37),
        "soft_cap": AttentionCall(scale=0.1, soft_cap=2.0),
        "sinks": AttentionCall(scale=0.1, sinks=torch.randn(8, device="cuda", dtype=torch.bfloat16)),
        "encoder_only": AttentionCall(scale=0.1, causal=False),
    }[feature]
    attention = build(provider, device, (8, 2), 128, block_size)
    for lens in (DECODES, MIXED):
        case = make_case(
            *lens, block_size=block_size, heads=(8, 2), head_size=128, dtype=torch.bfloat16,
            clear=attention.reads_unwritten_slots, device="cuda",
        )  # fmt: skip
        check(attention, case, call)


@pytest.mark.parametrize("block_size", [256, 512, 2048])
def test_a_last_block_s_unwritten_tail_is_not_touched(provider, device, block_size):
    """Whole pages of many queries are where a library might load by TMA, masked scores and all."""
    attention = build(provider, device, (8, 2), 128, block_size)
    if attention.reads_unwritten_slots:
        pytest.skip(f"{provider.name} declares that it reads unwritten slots")
    lens = (block_size + 200, 2 * block_size + 1), (block_size + 200, 300)
    case = make_case(
        *lens, block_size=block_size, heads=(8, 2), head_size=128, dtype=torch.bfloat16, clear=False, device="cuda"
    )
    check(attention, case, AttentionCall(scale=128**-0.5))


def test_a_captured_decode_follows_its_tensors(provider, device):
    """Replays read later lengths and tables; padding rows of length 0 stay finite."""
    block_size = max(64, provider.constraints(device).kernel_block_multiple)
    attention = build(provider, device, (8, 2), 128, block_size)
    if not attention.capturable:
        pytest.skip(f"{provider.name} does not declare that it can be captured")
    case = make_case(
        *DECODES, block_size=block_size, heads=(8, 2), head_size=128, dtype=torch.bfloat16,
        clear=attention.reads_unwritten_slots, device="cuda",
    )  # fmt: skip
    step, call = case.step, AttentionCall(scale=128**-0.5)
    lens, table = torch.zeros_like(step.seq_lens), torch.zeros(4, 64, dtype=torch.int32, device="cuda")
    bound = replace(step, seq_lens=lens, block_table=table, seq_lens_host=(640,) * 4, captured=True)

    def run():
        return attention.forward(case.query, case.key_cache, case.value_cache, attention.prepare(bound), call)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    whole = [x.float() for x in (case.query, case.key_cache, case.value_cache)]
    expected = ReferenceAttention().forward(*whole, step, call)
    for rows in (4, 2):
        lens.zero_()
        lens[:rows] = step.seq_lens[:rows]
        table[:, : step.block_table.shape[1]] = step.block_table
        graph.replay()
        torch.testing.assert_close(found[:rows].float(), expected[:rows], rtol=2e-2, atol=2e-2)
        assert found.isfinite().all()


def test_the_last_of_many_blocks_is_read_beyond_the_reach_of_32_bits(provider, device):
    block_size = max(64, provider.constraints(device).kernel_block_multiple)
    attention = build(provider, device, (8, 8), 128, block_size)
    num_blocks = 2**31 // (block_size * 8 * 128 * 2 * 3) + 70
    case = make_case(
        (3 * block_size, 5), (1, 5), block_size=block_size, heads=(8, 8), head_size=128, dtype=torch.bfloat16,
        num_blocks=num_blocks, placement="reversed", device="cuda", layout="cross_layer_NHD",
    )  # fmt: skip
    assert case.key_cache.stride(0) * (num_blocks - 1) > 2**31
    check(attention, case, AttentionCall(scale=128**-0.5))
