"""Checks of the Triton attention kernels against the reference; run by test_triton_interpreted.py, in its process.

On a CPU the kernels run under Triton's interpreter, which must be chosen before they are imported.
"""

from dataclasses import replace

import pytest
import torch

from makeready.attention_backends.flash.triton_kernels import configs
from makeready.attention_backends.flash.triton_kernels.impl import TritonImpl
from makeready.attention_backends.flash.triton_kernels.launch import (
    Shape,
    decode,
    plan_decode,
    plan_prefill,
    prefill,
)
from makeready.attention_backends.interface import AttentionCall, BuildRequest
from makeready.attention_backends.reference.impl import ReferenceAttention
from makeready.cache.specs import AttentionSpec
from makeready.config import LAYOUTS, AttentionConfig
from makeready.device import DeviceFacts
from paged_cases import make_case, step_of

CUDA = DeviceFacts(platform="cuda", device_type="cuda", compute_capability=(9, 0), compute_units=3)
UNITS = 3


def shape_of(case):
    return Shape(
        num_heads=case.query.shape[1],
        num_kv_heads=case.key_cache.shape[2],
        head_size=case.query.shape[2],
        head_size_v=case.value_cache.shape[3],
    )


def close(case, output, call, rows=slice(None), allowed=2e-6):
    expected = ReferenceAttention().forward(case.query, case.key_cache, case.value_cache, case.step, call)
    assert output[rows].isfinite().all()
    assert (output[rows] - expected[rows]).norm() <= allowed * expected[rows].norm()


def run_decode(case, call, *, queries=1, lse=None, **options):
    options = {"tile": 32, "warps": 4, "stages": 2, "swap": False, "programs": 2} | options
    config = configs.DecodeConfig(**options)
    shape = shape_of(case)
    work = plan_decode(case.step, shape, config, UNITS, fewest=1, queries=queries, window=call.sliding_window)
    output = torch.full((*case.query.shape[:2], case.value_cache.shape[3]), float("nan"), dtype=case.query.dtype)
    decode(output, lse, case.query, case.key_cache, case.value_cache, case.step, shape, work, call)
    return output


def run_prefill(case, call, *, fewest=1, lse=None, **options):
    options = {"block_m": 32, "block_n": 32, "warps": 4, "stages": 2, "source": "pages"} | options
    shape = shape_of(case)
    work = plan_prefill(case.step, shape, configs.PrefillConfig(**options), fewest=fewest)
    output = torch.full((*case.query.shape[:2], case.value_cache.shape[3]), float("nan"), dtype=case.query.dtype)
    prefill(output, lse, case.query, case.key_cache, case.value_cache, case.step, shape, work, call)
    return output


def call_of(case, **numbers):
    return AttentionCall(scale=case.query.shape[-1] ** -0.5, **numbers)


FEATURES = {
    "plain": lambda heads: {},
    "window": lambda heads: {"sliding_window": 37},
    "window of 1": lambda heads: {"sliding_window": 1},
    "soft cap": lambda heads: {"soft_cap": 3.0},
    "sinks": lambda heads: {"sinks": torch.randn(heads)},
    "alibi": lambda heads: {"alibi_slopes": torch.rand(heads)},
    "scales": lambda heads: {"key_scale": 0.7, "value_scale": 1.9},
    "all": lambda heads: {
        "sliding_window": 50, "soft_cap": 5.0, "sinks": torch.randn(heads), "alibi_slopes": torch.rand(heads) / 9,
    },
}  # fmt: skip


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("feature", FEATURES)
def test_decode(feature, swap):
    case = make_case([70, 5, 131, 33], [1, 1, 1, 1], heads=(4, 2), head_size=32, clear=False)
    call = call_of(case, **FEATURES[feature](4))
    close(case, run_decode(case, call, swap=swap), call)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("feature", ["plain", "window", "sinks"])
def test_decode_with_fixed_segments(feature, swap):
    case = make_case([70, 5, 131, 33], [1, 1, 1, 1], heads=(4, 2), head_size=32, clear=False)
    call = call_of(case, **FEATURES[feature](4))
    close(case, run_decode(case, call, swap=swap, fixed=2), call)


@pytest.mark.parametrize(("heads", "head_size"), [((4, 4), 16), ((7, 1), 24), ((16, 2), 40), ((16, 1), 32)])
def test_decode_of_other_groups_and_head_sizes(heads, head_size):
    case = make_case([45, 17], [1, 1], heads=heads, head_size=head_size, block_size=48, clear=False)
    close(case, run_decode(case, call_of(case)), call_of(case))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block_size", [16, 48, 96, 272])
def test_blocks_and_layouts(block_size, layout):
    case = make_case([45, 300], [1, 1], block_size=block_size, layout=layout, head_size_v=32, clear=False)
    close(case, run_decode(case, call_of(case)), call_of(case))
    case = make_case([45, 300], [45, 7], block_size=block_size, layout=layout, head_size_v=32, clear=False)
    close(case, run_prefill(case, call_of(case)), call_of(case))


@pytest.mark.parametrize("feature", FEATURES)
def test_a_few_query_tokens_by_the_decode_kernel(feature):
    case = make_case([70, 5, 131, 33], [3, 1, 4, 2], heads=(4, 2), head_size=32, clear=False)
    call = call_of(case, **FEATURES[feature](4))
    close(case, run_decode(case, call, queries=4), call)


@pytest.mark.parametrize("fixed", [0, 2])
@pytest.mark.parametrize("feature", FEATURES)
def test_prefill_from_pages(feature, fixed):
    case = make_case([70, 5, 131, 33], [70, 5, 40, 1], heads=(4, 2), head_size=32, clear=False)
    call = call_of(case, **FEATURES[feature](4))
    close(case, run_prefill(case, call, fixed=fixed), call)


@pytest.mark.parametrize("source", ["gathered", "copies"])
@pytest.mark.parametrize("feature", FEATURES)
def test_prefill_from_other_sources(feature, source):
    case = make_case([70, 131], [70, 40], heads=(7, 1), head_size=32, block_size=64, clear=False)
    call = call_of(case, **FEATURES[feature](7))
    close(case, run_prefill(case, call, source=source), call)


@pytest.mark.parametrize("source", ["pages", "gathered", "copies"])
def test_blocks_that_a_window_has_passed_are_not_read(source):
    case = make_case([170, 131], [40, 1], heads=(4, 2), head_size=32, clear=False)
    call = call_of(case, sliding_window=33)
    for row, length, q_len in zip(case.step.block_table, (170, 131), (40, 1), strict=True):
        passed = (length - q_len - 33 + 1) // 16
        for cache in (case.key_cache, case.value_cache):
            cache[row[:passed].long()] = float("nan")
            cache[row[passed].long(), : (length - q_len - 33 + 1) % 16] = float("nan")
    close(case, run_prefill(case, call, source=source), call)
    close(case, run_prefill(case, call, source=source, fixed=2), call)
    close(case, run_decode(case, call), call, rows=[40])
    close(case, run_decode(case, call, queries=64), call)


@pytest.mark.parametrize("window", [None, 21])
def test_prefill_that_sees_ahead(window):
    case = make_case([70, 33], [70, 33], heads=(4, 2), head_size=16, clear=False)
    call = call_of(case, causal=False, sliding_window=window)
    close(case, run_prefill(case, call), call)


@pytest.mark.parametrize("sinks", [False, True])
def test_log_sum_exp(sinks):
    case = make_case([70, 131], [4, 1], heads=(4, 2), head_size=32, clear=False)
    call = call_of(case, sinks=torch.randn(4) if sinks else None)
    expected = []
    for index, (key, q_len) in enumerate(zip(case.keys, (4, 1), strict=True)):
        query = case.query[4 * index : 4 * index + q_len].unflatten(1, (2, 2))
        scores = torch.einsum("qhgd,khd->qhgk", query, key).flatten(1, 2) * call.scale
        ahead = torch.arange(len(key)) > torch.arange(len(key) - q_len, len(key))[:, None]
        scores = scores.masked_fill(ahead[:, None], float("-inf"))
        if sinks:
            scores = torch.cat([scores, call.sinks[None, :, None].expand(q_len, 4, 1)], dim=-1)
        expected.append(scores.logsumexp(-1))
    for run, options in ((run_decode, {"queries": 4}), (run_prefill, {}), (run_prefill, {"source": "gathered"})):
        lse = torch.full((5, 4), float("nan"))
        run(case, call, lse=lse, **options)
        assert torch.allclose(lse, torch.cat(expected), atol=1e-5)


def test_a_longest_request_is_shared_by_every_program():
    case = make_case([1500, 3], [1, 1], heads=(2, 1), head_size=16, clear=False)
    close(case, run_decode(case, call_of(case), programs=5), call_of(case))


def build(
    heads=(4, 2), head_size=32, block_size=16, *, invariant=False, dtype="float32", max_model_len=4096, mla=False,
    units=UNITS,
):  # fmt: skip
    spec = AttentionSpec(
        num_query_heads=heads[0], num_kv_heads=heads[1], head_size=head_size, head_size_v=head_size, dtype=dtype,
        mla=mla,
    )  # fmt: skip
    request = BuildRequest(
        device=CUDA, spec=spec, dtype=dtype, block_size=block_size, kernel_block_size=block_size, num_blocks=64,
        max_num_seqs=8, max_num_batched_tokens=512, max_model_len=max_model_len,
        config=AttentionConfig(batch_invariant=invariant),
    )  # fmt: skip
    return TritonImpl(request, units)


@pytest.mark.parametrize("invariant", [False, True])
def test_a_mixed_step_through_the_backend(invariant):
    case = make_case([70, 5, 131, 33, 90], [1, 5, 100, 1, 90], heads=(4, 2), head_size=32, clear=False)
    attention = build(invariant=invariant)
    for call in (call_of(case), call_of(case, sliding_window=20), call_of(case, soft_cap=2.0)):
        output = attention.forward(case.query, case.key_cache, case.value_cache, attention.prepare(case.step), call)
        close(case, output, call)


def test_padding_of_a_bucket_gives_zeros():
    case = make_case([70, 5, 33, 5], [1, 1, 1, 1], heads=(4, 2), head_size=32, clear=False)
    step = replace(
        case.step, captured=True, seq_lens=torch.tensor([70, 0, 33, 0], dtype=torch.int32), seq_lens_host=(200,) * 4
    )
    for invariant in (False, True):
        attention = build(invariant=invariant)
        for call in (call_of(case), call_of(case, sinks=torch.randn(4)), call_of(case, sliding_window=9)):
            output = attention.forward(case.query, case.key_cache, case.value_cache, attention.prepare(step), call)
            assert (output[[1, 3]] == 0).all()
            close(case, output, call, rows=[0, 2])


@pytest.mark.parametrize("lens", [(1, 1, 100, 5), (1, 1, 1, 23), (1, 1, 60, 61)])
@pytest.mark.parametrize("invariant", [False, True])
def test_a_captured_step_with_prefill_reads_from_the_device_who_has_how_many_tokens(lens, invariant):
    tokens, keys = 128, (70, 5, 131, 90)
    padding = tokens - sum(lens)
    case = make_case([*keys, padding], [*lens, padding], heads=(4, 2), head_size=32, clear=False)
    step = ragged_step(case, lens, keys, tokens)
    attention, real = build(invariant=invariant), slice(0, sum(lens))
    for call in (call_of(case), call_of(case, sliding_window=20), call_of(case, sinks=torch.randn(4))):
        output = attention.forward(case.query, case.key_cache, case.value_cache, attention.prepare(step), call)
        close(case, output, call, rows=real)
        assert (output[sum(lens) :] == 0).all()


def ragged_step(case, lens, keys, tokens):
    """Rows: two decodes and two empty ones, then two chunks, an empty row, and one that fills the step up."""
    places = [0, 2, 4, 5, 7]
    starts, seq_lens, table = [0] * 9, torch.zeros(8, dtype=torch.int32), torch.zeros(8, case.step.block_table.shape[1])
    for row, place in enumerate(places):
        starts[place + 1 :] = [int(case.step.query_start[row + 1])] * (8 - place)
        seq_lens[place] = (*keys, 0)[row]
        table[place] = case.step.block_table[row]
    return replace(
        case.step, captured=True, num_ragged=4, query_start=torch.tensor(starts, dtype=torch.int32), seq_lens=seq_lens,
        block_table=table.int(), query_lens_host=(*[0] * 7, tokens), seq_lens_host=(200,) * 8,
    )  # fmt: skip


def latent_case(keys, lens, heads, sizes):
    """Latents in K's pages, rotary parts in V's, and queries over both."""
    case = make_case(keys, lens, heads=(heads, 1), head_size=sizes[0], head_size_v=sizes[1], clear=False)
    call = AttentionCall(scale=0.3)
    return case, torch.randn(sum(lens), heads, sum(sizes)), call


@pytest.mark.parametrize("heads", [4, 40])
@pytest.mark.parametrize("lens", [(1, 1, 1, 1), (1, 3, 70, 1)])
def test_latents_are_attended_to_as_they_are(lens, heads):
    case, query, call = latent_case((130, 40, 70, 1), lens, heads, (24, 8))
    expected = ReferenceAttention().forward_latent(query, case.key_cache, case.value_cache, case.step, call)
    for invariant in (False, True):
        attention = build((heads, 1), 24, invariant=invariant, mla=True)
        prepared = attention.prepare(case.step)
        output = attention.forward_latent(query, case.key_cache, case.value_cache, prepared, call)
        assert (output - expected).norm() <= 2e-6 * expected.norm()


def test_keys_of_a_decode_over_latents_are_shared_out():
    case, query, call = latent_case((1000, 3), (1, 1), 4, (32, 16))
    attention = build((4, 1), mla=True, units=12)
    prepared = attention.prepare(case.step)
    assert prepared.latent.splits == 6
    output = attention.forward_latent(query, case.key_cache, case.value_cache, prepared, call)
    expected = ReferenceAttention().forward_latent(query, case.key_cache, case.value_cache, case.step, call)
    assert (output - expected).norm() <= 2e-6 * expected.norm()


def test_latents_in_a_captured_step_with_prefill():
    keys, lens = (70, 5, 131, 90), (1, 1, 60, 61)
    case, query, call = latent_case((*keys, 5), (*lens, 5), 4, (24, 8))
    step = ragged_step(case, lens, keys, 128)
    attention = build((4, 1), mla=True, units=12)
    output = attention.forward_latent(query, case.key_cache, case.value_cache, attention.prepare(step), call)
    expected = ReferenceAttention().forward_latent(query, case.key_cache, case.value_cache, case.step, call)
    assert (output - expected)[:123].norm() <= 2e-6 * expected[:123].norm()
    assert (output[123:] == 0).all()


def test_gathered_keys_and_values_of_two_widths():
    case = make_case([70, 5, 33], [70, 1, 5], heads=(4, 4), head_size=24, head_size_v=16, clear=False)
    output = build(head_size=24).forward_gathered(case.query, case.keys, case.values, case.step, call_of(case))
    close(case, output, call_of(case))


@pytest.mark.parametrize("window", [None, 100])
def test_batch_invariant_bits(window):
    """Alone or with others, whole or in chunks: the same bits. (Decoded too, on a device: see the CUDA tests.)"""
    lens = [200, 70, 131]
    case = make_case(lens, lens, heads=(4, 2), head_size=32, clear=False)
    attention = build(invariant=True)
    call = call_of(case, sliding_window=window)

    def run(step, query):
        return attention.forward(query, case.key_cache, case.value_cache, attention.prepare(step), call)

    table = [row[row > 0].tolist() for row in case.step.block_table]
    whole = run(case.step, case.query)[:200]
    for start, count in ((0, 70), (70, 100), (170, 30)):
        step = step_of([start + count], [count], table[:1], 16)
        assert torch.equal(run(step, case.query[start : start + count]), whole[start : start + count])
