"""Batch invariance of flex, bit for bit: alone, in a batch, in chunks, elsewhere in the cache, and in training."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from makeready.attention_backends.flex import FlexBackend
from makeready.attention_backends.flex.training import soft_cap_modifier, training_kernel
from makeready.attention_backends.interface import AttentionCall, BuildRequest
from makeready.attention_backends.reference.impl import ReferenceAttention
from makeready.cache.specs import AttentionSpec
from makeready.config import AttentionConfig
from makeready.device import DeviceFacts
from makeready.errors import BackendError
from makeready.platforms.kernel_blocks import kernel_block_size
from paged_cases import Case, cache_views, place, step_of

CUDA = pytest.param("cuda", marks=pytest.mark.cuda)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build(device, block_size, heads, head_size, dtype, **config):
    capability = torch.cuda.get_device_capability() if device == "cuda" else None
    facts = DeviceFacts(platform=device, device_type=device, compute_capability=capability)
    spec = AttentionSpec(
        num_query_heads=heads[0], num_kv_heads=heads[1], head_size=head_size, head_size_v=head_size, dtype=dtype
    )
    return FlexBackend().build(
        BuildRequest(
            device=facts, spec=spec, dtype=dtype, block_size=block_size,
            kernel_block_size=kernel_block_size(FlexBackend().capabilities(facts), block_size),
            num_blocks=blocks_of(block_size), max_num_seqs=64, max_num_batched_tokens=2048, max_model_len=1056,
            config=AttentionConfig(batch_invariant=True, **config),
        )
    )  # fmt: skip


def blocks_of(block_size):
    return 4096 // block_size + 80


@cache
def built(*args):
    return build(*args)


def sequence(length, heads, head_size, dtype, device, seed):
    """Query, key and value of one sequence, of which requests compute parts."""
    rng = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(length, count, head_size, generator=rng).to(dtype).to(device)
        for count in (heads[0], heads[1], heads[1])
    )


def paged(sequences, parts, block_size, placement="random", seed=0) -> Case:
    """Request ``i`` computes the last ``parts[i][1]`` of the first ``parts[i][0]`` tokens of its sequence."""
    query, key, _ = sequences[0]
    device, dtype = query.device, query.dtype
    seq_lens, q_lens = [end for end, _ in parts], [count for _, count in parts]
    num_blocks = blocks_of(block_size)
    tables = place([-(-end // block_size) for end in seq_lens], num_blocks, placement, seed)
    caches = cache_views("NHD", num_blocks, 3, block_size, key.shape[1], key.shape[2], key.shape[2], dtype, device)
    for table, (_, *both), end in zip(tables, sequences, seq_lens, strict=True):
        for cache_, values in zip(caches, both, strict=True):
            cache_[table] = 0
            for number, block in enumerate(table):
                part = values[number * block_size : min(end, (number + 1) * block_size)]
                cache_[block, : len(part)] = part
    queries = [q[end - count : end] for (q, _, _), (end, count) in zip(sequences, parts, strict=True)]
    return Case(torch.cat(queries), [], [], *caches, step_of(seq_lens, q_lens, tables, block_size, device))


def run(impl, case, call):
    return impl.forward(case.query, case.key_cache, case.value_cache, impl.prepare(case.step), call)


SHAPES = [
    ("cpu", 16, (4, 2), 32, "float32"),
    ("cpu", 48, (4, 1), 64, "bfloat16"),
    *(
        pytest.param("cuda", *shape, marks=pytest.mark.cuda)
        for shape in (
            (16, (8, 2), 128, "bfloat16"),
            (64, (8, 2), 128, "bfloat16"),
            (528, (6, 2), 80, "float16"),
            (544, (16, 2), 256, "bfloat16"),
            (16, (4, 4), 64, "float32"),
        )
    ),
]


@pytest.mark.parametrize("features", [{}, {"sliding_window": 100}, {"soft_cap": 5.0}], ids=str)
@pytest.mark.parametrize(("device", "block_size", "heads", "head_size", "dtype"), SHAPES)
def test_a_request_has_the_same_bits_wherever_and_with_whomever_it_runs(
    device, block_size, heads, head_size, dtype, features
):
    impl = built(device, block_size, heads, head_size, dtype)
    call = AttentionCall(scale=head_size**-0.5, **features)
    length = 333
    mine = sequence(length, heads, head_size, DTYPES[dtype], device, seed=1)
    whole_case = paged([mine], [(length, length)], block_size)
    whole = run(impl, whole_case, call)
    expected = ReferenceAttention().forward(
        whole_case.query, whole_case.key_cache, whole_case.value_cache, whole_case.step, call
    )
    tolerance = 2e-5 if dtype == "float32" and device == "cpu" else 2e-2
    torch.testing.assert_close(whole.float(), expected.float(), atol=tolerance, rtol=tolerance)
    others = 63 if block_size < 500 else 5
    rest = [sequence(40 + 3 * i, heads, head_size, DTYPES[dtype], device, seed=2 + i) for i in range(min(others, 10))]
    rest = [rest[i % len(rest)] for i in range(others)]
    for end, count in ((length, 1), (length - 13, 1), (320, 1), (length, 40), (300, 77)):
        alone = run(impl, paged([mine], [(end, count)], block_size, "reversed"), call)
        assert torch.equal(alone, whole[end - count : end]), ("alone", end, count)
        parts = [(len(q), 1 + i % 3) for i, (q, _, _) in enumerate(rest)]
        batch = paged([*rest[:3], mine, *rest[3:]], [*parts[:3], (end, count), *parts[3:]], block_size, "interleaved")
        start = sum(n for _, n in parts[:3])
        together = run(impl, batch, call)[start : start + count]
        assert torch.equal(together, whole[end - count : end]), ("in a batch", end, count)


def even_distance(request, head, query, key):
    return (query - key) % (2 + head % 2) == 0


@pytest.mark.parametrize(
    "features", [{}, {"sliding_window": 100}, {"soft_cap": 5.0}, {"mask_mod": even_distance}], ids=lambda f: "+".join(f)
)
@pytest.mark.parametrize(("device", "block_size", "heads", "head_size", "dtype"), SHAPES)
def test_training_has_the_same_bits(device, block_size, heads, head_size, dtype, features):
    torch._dynamo.reset()  # plain flex_attention counts every mask as one more recompilation
    if device == "cpu" and dtype != "float32" and torch.cpu._is_amx_tile_supported():
        with pytest.raises(BackendError, match="on a CPU with AMX"):
            training_kernel(head_size=head_size, dtype=dtype, kernel_block_size=16, device_type=device)
        return
    impl = built(device, block_size, heads, head_size, dtype)
    call = AttentionCall(scale=head_size**-0.5, **features)
    length = 333
    mine = sequence(length, heads, head_size, DTYPES[dtype], device, seed=1)
    kernel = training_kernel(
        head_size=head_size, dtype=dtype, kernel_block_size=impl.settings.kernel_block_size, device_type=device
    )
    padded = kernel.padded(length)
    q, k, v = (
        torch.cat([part, part.new_zeros(padded - length, *part.shape[1:])]).transpose(0, 1)[None] for part in mine
    )
    full = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    mask = kernel.block_mask(
        padded, device=device, sliding_window=call.sliding_window, mask_mod=features.get("mask_mod")
    )
    trained = full(
        q, k, v, score_mod=soft_cap_modifier(call.soft_cap) if call.soft_cap else None, block_mask=mask,
        scale=call.scale, enable_gqa=heads[0] != heads[1], kernel_options=dict(kernel.options),
    )[0].transpose(0, 1)[:length]  # fmt: skip
    whole = run(impl, paged([mine], [(length, length)], block_size), call)
    assert torch.equal(whole, trained)
    for end in (length, 300, 64, 17):
        alone = run(impl, paged([mine], [(end, 1)], block_size), call)
        assert torch.equal(alone[0], trained[end - 1]), end


@pytest.mark.cuda
def test_a_training_pass_has_gradients():
    kernel = training_kernel(head_size=64, dtype="bfloat16", kernel_block_size=16, device_type="cuda")
    q, k, v = (
        torch.randn(1, heads, 256, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True) for heads in (4, 2, 2)
    )
    full = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    out = full(
        q, k, v, block_mask=kernel.block_mask(256, device="cuda"), enable_gqa=True, kernel_options=dict(kernel.options)
    )
    out.float().square().sum().backward()
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    expected = torch.autograd.grad(plain.float().square().sum(), (q, k, v))
    for tensor, gradient in zip((q, k, v), expected, strict=True):
        torch.testing.assert_close(tensor.grad.float(), gradient.float(), atol=0.1, rtol=0.1)


def test_settings_that_cannot_promise_it_are_refused_by_name():
    facts = DeviceFacts(platform="cuda", device_type="cuda")
    spec = AttentionSpec(num_query_heads=64, num_kv_heads=1, head_size=64, head_size_v=64, dtype="bfloat16")
    request = BuildRequest(
        device=facts, spec=spec, dtype="bfloat16", block_size=16, kernel_block_size=16, num_blocks=99, max_num_seqs=4,
        max_num_batched_tokens=64, max_model_len=256,
        config=AttentionConfig(batch_invariant=True, flex_attn_block_m=32, flex_attn_q_block_size=64),
    )  # fmt: skip
    with pytest.raises(BackendError, match="flex_attn_block_m 32 is smaller than the 64 query heads of a KV head"):
        FlexBackend().build(request)
    xpu = replace(
        request, device=DeviceFacts(platform="xpu", device_type="xpu"), config=AttentionConfig(batch_invariant=True)
    )
    with pytest.raises(BackendError, match="flex on xpu cannot promise the same bits"):
        FlexBackend().build(xpu)
