"""Our Triton kernels on a CUDA device: the issue's shapes, on NaN-poisoned memory, against float32."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from makeready.attention_backends.flash.triton_kernels import TritonProvider, configs
from makeready.attention_backends.interface import AttentionCall, BuildRequest
from makeready.attention_backends.reference.impl import ReferenceAttention
from makeready.cache.specs import AttentionSpec
from makeready.cache.write import write_kv
from makeready.config import LAYOUTS, AttentionConfig
from makeready.platforms.probing import probe_cuda
from paged_cases import make_case, step_of

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")]
CUDA = torch.device("cuda")
NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float8_e4m3fn: "fp8_e4m3"}
ALLOWED = {torch.bfloat16: 5e-3, torch.float16: 1e-3}
"""Root mean square against float32, relative: bf16 rounding of P and of the output."""


def build(heads, head_size, block_size, *, invariant=False, dtype=torch.bfloat16, kv_dtype=None, max_model_len=8192):
    spec = AttentionSpec(
        num_query_heads=heads[0], num_kv_heads=heads[1], head_size=head_size, head_size_v=head_size,
        dtype=NAMES[kv_dtype or dtype],
    )  # fmt: skip
    request = BuildRequest(
        device=probe_cuda().devices[0], spec=spec, dtype=NAMES[dtype], block_size=block_size,
        kernel_block_size=block_size, num_blocks=64, max_num_seqs=64, max_num_batched_tokens=8192,
        max_model_len=max_model_len, config=AttentionConfig(batch_invariant=invariant),
    )  # fmt: skip
    return TritonProvider().build(request)


def run(attention, case, call, step=None, query=None):
    step = step or case.step
    query = case.query if query is None else query
    return attention.forward(query, case.key_cache, case.value_cache, attention.prepare(step), call)


def check(attention, case, call, rows=slice(None)):
    expected = ReferenceAttention().forward(case.query.float(), case.key_cache, case.value_cache, case.step, call)
    output = run(attention, case, call)
    assert output[rows].isfinite().all()
    error = (output[rows].float() - expected[rows]).norm() / expected[rows].norm()
    assert error < ALLOWED[case.query.dtype], error


def call_of(case, **numbers):
    return AttentionCall(scale=case.query.shape[-1] ** -0.5, **numbers)


STEPS = {
    "decode": ([700, 1, 64, 2111, 16, 333], [1] * 6),
    "prefill": ([700, 3, 2300], [700, 3, 600]),
    "mixed": ([700, 900, 64, 1500, 40], [1, 300, 1, 130, 9]),
}


@pytest.mark.parametrize("step", ["decode", "mixed"])
@pytest.mark.parametrize("group", [1, 4, 7, 8, 16])
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 192, 256])
def test_head_sizes_and_groups(head_size, group, step):
    lens, queries = STEPS[step]
    heads = (2 * group, 2)
    case = make_case(
        lens, queries, heads=heads, head_size=head_size, block_size=64, dtype=torch.bfloat16, device=CUDA, clear=False
    )
    check(build(heads, head_size, 64), case, call_of(case))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("block_size", "layout"),
    [(size, "NHD") for size in (16, 32, 128, 528, 544, 1568, 2112)]
    + [(size, layout) for size in (16, 544) for layout in LAYOUTS if layout != "NHD"],
)
def test_block_sizes_and_layouts(block_size, step, layout):
    lens, queries = STEPS[step]
    case = make_case(
        lens, queries, heads=(8, 2), head_size=128, block_size=block_size, dtype=torch.bfloat16, device=CUDA,
        clear=False, layout=layout,
    )  # fmt: skip
    check(build((8, 2), 128, block_size), case, call_of(case))


FEATURES = {
    "window": {"sliding_window": 100},
    "soft cap": {"soft_cap": 3.0},
    "sinks": {"sinks": torch.linspace(-1, 2, 8)},
    "alibi": {"alibi_slopes": torch.linspace(0.01, 0.5, 8)},
    "scales": {"key_scale": 0.5, "value_scale": 1.5},
    "all": {"sliding_window": 300, "soft_cap": 9.0, "sinks": torch.ones(8), "alibi_slopes": torch.ones(8) / 50},
}


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("head_size", [128, 256])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature, step, head_size, invariant):
    lens, queries = STEPS[step]
    case = make_case(lens, queries, heads=(8, 2), head_size=head_size, dtype=torch.float16, device=CUDA, clear=False)
    numbers = {name: x.to(CUDA) if isinstance(x, torch.Tensor) else x for name, x in FEATURES[feature].items()}
    check(build((8, 2), head_size, 16, dtype=torch.float16, invariant=invariant), case, call_of(case, **numbers))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("head_size", [64, 128, 256])
def test_fp8_keys_and_values(head_size, step):
    lens, queries = STEPS[step]
    case = make_case(lens, queries, heads=(8, 2), head_size=head_size, dtype=torch.bfloat16, device=CUDA, clear=False)
    key, value = (cache.to(torch.float8_e4m3fn) for cache in (case.key_cache, case.value_cache))
    case = replace(case, key_cache=key, value_cache=value)
    attention = build((8, 2), head_size, 16, kv_dtype=torch.float8_e4m3fn)
    check(attention, case, call_of(case, key_scale=0.5, value_scale=2.0))


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_write_agrees_with_the_host(stored, rotary):
    key, value = (torch.randn(333, 4, 96).bfloat16() * 300 for _ in range(2))
    slots = torch.randperm(40 * 16)[:333]
    slots[[0, 9, 332]] = -1
    turned = (torch.randn(333, 32), torch.randn(333, 32)) if rotary else None
    found = []
    for device in ("cpu", "cuda"):
        pages = torch.zeros(40, 16, 8, 96, dtype=stored, device=device)
        write_kv(
            key.to(device), value.to(device), pages[:, :, :4], pages[:, :, 4:], slots.to(device), scales=(2.0, 0.5),
            rotary=turned and tuple(x.to(device) for x in turned),
        )  # fmt: skip
        found.append(pages.float().cpu())
    near = torch.finfo(stored).eps  # the last bit may differ: the device may fuse a multiplication and an addition
    assert ((found[0] - found[1]).abs() <= near * found[0].abs() + 1e-2).all()
    assert (found[0] == found[1]).float().mean() > 0.99


@pytest.mark.parametrize("computed", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16])
def test_write_keeps_nan_and_clamps_infinities_as_the_host_does(computed, stored):
    rows = torch.zeros(6, 2, 16, dtype=computed)
    rows[..., :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 60_000.0]).to(computed)
    slots = torch.tensor([3, 20, -1, 17, 5, 40])
    found = []
    for device in ("cpu", CUDA):
        pages = torch.zeros(4, 16, 4, 16, dtype=stored, device=device)
        write_kv(rows.to(device), rows.to(device), pages[:, :, :2], pages[:, :, 2:], slots.to(device))
        found.append(pages.float().cpu())
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0, equal_nan=True)
    assert found[1].isnan().sum() == 5 * 2 * 2


def test_the_top_of_a_cache_of_more_than_two_to_the_31_elements():
    heads, width, block_size, count = 8, 128, 16, 70_000
    pages = torch.empty(count, block_size, 2 * heads, width, dtype=torch.bfloat16, device=CUDA)
    assert pages.numel() > 2**31
    key_cache, value_cache = pages[:, :, :heads], pages[:, :, heads:]
    lens = [200, 40]
    tables = [[*range(count - 1, count - 14, -1)], [1, count - 20, 3]]
    key, value = (torch.randn(sum(lens), heads, width, device=CUDA).bfloat16() for _ in range(2))
    step = step_of(lens, lens, tables, block_size, CUDA)
    for table in tables:
        pages[table] = float("nan")
    write_kv(key, value, key_cache, value_cache, step.slot_mapping)
    dense = make_case(lens, lens, heads=(32, heads), head_size=width, block_size=block_size, dtype=torch.bfloat16)
    small_key, small_value = (cache.to(CUDA) for cache in (dense.key_cache, dense.value_cache))
    small = replace(step, block_table=dense.step.block_table.to(CUDA), slot_mapping=dense.step.slot_mapping.to(CUDA))
    write_kv(key, value, small_key, small_value, small.slot_mapping)
    attention = build((32, heads), width, block_size)
    for queries in (lens, [1, 1]):
        query = torch.randn(sum(queries), 32, width, device=CUDA).bfloat16()
        top = replace(step_of(lens, queries, tables, block_size, CUDA))
        low = replace(top, block_table=small.block_table)
        call = AttentionCall(scale=width**-0.5)
        outputs = [
            attention.forward(query, k, v, attention.prepare(where), call)
            for k, v, where in ((key_cache, value_cache, top), (small_key, small_value, low))
        ]
        assert outputs[0].isfinite().all()
        assert torch.equal(*outputs)


@pytest.mark.parametrize("invariant", [False, True])
def test_a_captured_decode_follows_its_tensors(invariant):
    lens = [700, 1, 64, 2111]
    case = make_case(lens, [1] * 4, heads=(8, 2), head_size=128, dtype=torch.bfloat16, device=CUDA, clear=False)
    attention, call = build((8, 2), 128, 16, invariant=invariant), call_of(case)
    lengths = case.step.seq_lens.clone()
    step = replace(case.step, captured=True, seq_lens=lengths, seq_lens_host=(8192,) * 4)
    lengths.zero_()
    run(attention, case, call, step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run(attention, case, call, step)
    for now in (lens, [30, 1, 0, 2111], [0, 0, 0, 0], [700, 1, 0, 5]):
        lengths.copy_(torch.tensor(now))
        graph.replay()
        real = [i for i, length in enumerate(now) if length]
        exact = replace(case, step=replace(case.step, seq_lens_host=tuple(n or 1 for n in now)))
        expected = ReferenceAttention().forward(case.query.float(), case.key_cache, case.value_cache, exact.step, call)
        assert output.isfinite().all()
        if real:
            assert (output[real].float() - expected[real]).norm() < 5e-3 * expected[real].norm()


@pytest.mark.parametrize("head_size", [64, 128, 256])
@pytest.mark.parametrize("window", [None, 300])
def test_batch_invariant_bits(head_size, window, monkeypatch):
    """Alone or with others, whole or in chunks, prefilled or decoded: the same bits, of sums too."""
    lens = [3000, 700, 1500]
    case = make_case(
        lens, lens, heads=(8, 2), head_size=head_size, block_size=64, dtype=torch.bfloat16, device=CUDA, clear=False
    )
    # A short segment, so that requests have several.
    attention, call = build((8, 2), head_size, 64, invariant=True), call_of(case, sliding_window=window)
    monkeypatch.setattr(configs, "SEGMENT", 512)

    def bits(step, query):
        caches = (case.key_cache, case.value_cache)
        return attention.forward_with_lse(query, *caches, attention.prepare(step), call)

    whole = bits(case.step, case.query)
    table = [row[row > 0].tolist() for row in case.step.block_table]
    for start, count in ((0, 700), (700, 1300), (1999, 2), (2900, 100), (2999, 1), (2048, 1), (64, 1), (0, 1)):
        step = step_of([start + count], [count], table[:1], 64, CUDA)
        alone = bits(step, case.query[start : start + count])
        for one, of_all in zip(alone, whole, strict=True):
            assert torch.equal(one, of_all[start : start + count]), (start, count)
    decodes = step_of([2500, 600, 1500, 33], [1] * 4, [table[0], table[1], table[2], table[0]], 64, CUDA)
    rows = [2499, 3000 + 599, 3700 + 1499, 32]
    together = bits(decodes, case.query[rows].contiguous())
    for one, of_all in zip(together, whole, strict=True):
        assert torch.equal(one, of_all[rows])
