"""Compiled flex against the reference. Shapes are few: on CPU every compiled variant costs seconds."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from makeready.attention_backends.flex import FlexBackend
from makeready.attention_backends.flex.impl import FlexAttention
from makeready.attention_backends.flex.settings import flex_settings
from makeready.attention_backends.interface import AttentionCall, BuildRequest
from makeready.attention_backends.reference.impl import ReferenceAttention
from makeready.cache.specs import AttentionSpec
from makeready.config import AttentionConfig
from makeready.device import DeviceFacts
from makeready.errors import BackendError
from makeready.platforms.kernel_blocks import kernel_block_size
from paged_cases import make_case, step_of

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 3e-3}
CALL = AttentionCall(scale=0.25)


def request(device="cpu", block_size=16, heads=(4, 2), head_size=16, dtype="float32", **changes):
    facts = DeviceFacts(platform=device, device_type=device)
    spec = AttentionSpec(
        num_query_heads=heads[0],
        num_kv_heads=heads[1],
        head_size=head_size,
        head_size_v=head_size,
        dtype=dtype,
    )
    base = BuildRequest(
        device=facts, spec=spec, dtype=dtype, block_size=block_size,
        kernel_block_size=kernel_block_size(FlexBackend().capabilities(facts), block_size), num_blocks=96,
        max_num_seqs=8, max_num_batched_tokens=512, max_model_len=1056, config=AttentionConfig(),
    )  # fmt: skip
    return replace(base, **changes)


@cache
def built(*args) -> FlexAttention:
    """One build, and so one set of compiled kernels, for all tests that agree on its facts."""
    return FlexBackend().build(request(*args))


def compare(impl, case, call, dtype="float32"):
    out = impl.forward(case.query, case.key_cache, case.value_cache, impl.prepare(case.step), call)
    reference = ReferenceAttention()
    expected = reference.forward(case.query, case.key_cache, case.value_cache, case.step, call)
    assert out.dtype == case.query.dtype
    assert out.is_contiguous()
    limit = TOLERANCE[dtype]
    torch.testing.assert_close(out.float(), expected.float(), atol=limit, rtol=limit)


@pytest.mark.parametrize("device", DEVICES)
def test_every_batch_of_a_bucket_shares_its_kernels(device):
    """Ragged lengths, decode beside prefill, adversarial placement: right, with nothing compiled anew."""
    impl = built(device)
    before = impl.compile_count
    compare(impl, make_case([5, 37, 48, 700], [1, 1, 1, 1], num_blocks=96, device=device), CALL)
    compare(impl, make_case([16, 37], [16, 2], num_blocks=96, device=device), CALL)
    compare(impl, make_case([100, 1], [40, 1], num_blocks=96, device=device), CALL)
    compiled = impl.compile_count
    if device == "cpu":
        assert compiled - before <= 3
    steps = [
        ([1], [1]), ([900, 16, 15, 17, 1, 2, 33], [1] * 7), ([3, 400, 65], [3, 1, 15]), ([64, 63], [40, 39]),
        ([200, 7], [17, 7]),
    ]  # fmt: skip
    for seed, placement in enumerate(("random", "reversed", "interleaved")):
        for seq_lens, q_lens in steps:
            case = make_case(seq_lens, q_lens, num_blocks=96, placement=placement, seed=seed, device=device)
            compare(impl, case, CALL)
    if device == "cpu":
        assert impl.compile_count == compiled


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("block_size", "heads", "head_size", "dtype", "layout"),
    [
        (48, (4, 1), 64, "bfloat16", "HND"),
        (528, (4, 4), 80, "float16", "cross_layer_NHD"),
        (2112, (6, 2), 64, "float32", "cross_layer_HND"),
    ],
)
def test_block_sizes_layouts_heads_and_dtypes(device, block_size, heads, head_size, dtype, layout):
    impl = built(device, block_size, heads, head_size, dtype)
    case = make_case(
        [600, 37, 530, 1], [1, 5, 2, 1], num_blocks=96 if block_size < 500 else 8, block_size=block_size,
        heads=heads, head_size=head_size, dtype=DTYPES[dtype], layout=layout, device=device,
    )  # fmt: skip
    compare(impl, case, AttentionCall(scale=head_size**-0.5), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "features",
    [
        {"sliding_window": 33},
        {"sliding_window": 20, "soft_cap": 3.0},
        {"causal": False},
    ],
    ids=lambda features: "+".join(features),
)
def test_features(device, features):
    q_lens = [5, 40, 20] if features.get("causal") is False else [1, 40, 1]
    seq_lens = q_lens if features.get("causal") is False else [150, 100, 9]
    case = make_case(seq_lens, q_lens, num_blocks=96, device=device, placement="interleaved")
    compare(built(device), case, AttentionCall(scale=0.25, **features))


@pytest.mark.cuda
def test_sinks_on_cuda():
    sinks = torch.tensor([0.5, -1.0, 3.0, 0.0], device="cuda")
    case = make_case([150, 100, 9], [1, 40, 1], num_blocks=96, device="cuda")
    compare(built("cuda"), case, AttentionCall(scale=0.25, sinks=sinks))


@pytest.mark.parametrize("device", DEVICES)
def test_a_window_never_looks_at_blocks_that_it_has_left(device):
    """Entries before the window name the null block, or a block that another request holds by now."""
    case = make_case([150, 100], [1, 1], num_blocks=96, device=device)
    table = case.step.block_table.clone()
    table[0, :4] = table[1, 5]
    table[0, 4:7] = 0
    stale = replace(case, step=replace(case.step, block_table=table))
    compare(built(device), stale, AttentionCall(scale=0.25, sliding_window=33))


@pytest.mark.parametrize("device", DEVICES)
def test_requests_share_the_blocks_of_a_prefix(device):
    case = make_case([64, 70], [1, 1], num_blocks=96, device=device)
    table = case.step.block_table.clone()
    table[1, :4] = table[0, :4]
    compare(built(device), replace(case, step=replace(case.step, block_table=table)), CALL)


@pytest.mark.parametrize("device", DEVICES)
def test_gathered_keys_with_another_value_width(device):
    """What MLA models pass: nothing paged, widths that the cache does not have."""
    width, value_width = (24, 16) if device == "cpu" else (48, 32)
    case = make_case([5, 100, 37], [1, 40, 1], head_size=width, head_size_v=value_width, device=device)
    args = (case.query, case.keys, case.values, case.step, AttentionCall(scale=0.2))
    impl = built(device)
    expected = ReferenceAttention().forward_gathered(*args)
    torch.testing.assert_close(impl.forward_gathered(*args), expected, atol=2e-5, rtol=2e-5)


def test_the_limit_of_compiled_variants_is_an_error_and_not_eager_attention():
    impl = FlexAttention(built("cpu").settings, variant_limit=1)
    compare(impl, make_case([30], [1], num_blocks=96), CALL)
    longer = make_case([30], [9], num_blocks=96)
    with pytest.raises(BackendError, match="more than the 1 compiled variants"):
        compare(impl, longer, CALL)


def test_sinks_are_refused_on_cpu():
    case = make_case([30], [1], num_blocks=96)
    with pytest.raises(BackendError, match="flex on cpu has no attention sinks"):
        compare(built("cpu"), case, AttentionCall(scale=0.25, sinks=torch.zeros(4)))


def test_a_step_or_a_sequence_that_the_build_was_not_made_for():
    impl = built("cpu")
    with pytest.raises(BackendError, match="built for blocks of 16 tokens, and the step's have 48"):
        impl.prepare(step_of([5], [1], [[1]], 48))
    case = make_case([1100], [1], num_blocks=96)
    with pytest.raises(BackendError, match="69 kernel blocks of 16 tokens is longer than the 66"):
        compare(impl, case, CALL)


def test_views_that_are_not_one_run_of_tokens():
    impl = built("cpu")
    unequal = make_case([30], [1], head_size=16, head_size_v=32, layout="HND", num_blocks=96)
    with pytest.raises(BackendError, match="K's blocks are 96 tokens apart and V's 48"):
        compare(impl, unequal, CALL)
    case = make_case([30], [1], num_blocks=96)
    with pytest.raises(BackendError, match="last must be 1"):
        compare(impl, replace(case, key_cache=case.key_cache.transpose(2, 3)), CALL)
    short = FlexAttention(replace(impl.settings, max_view_elements=1000))
    with pytest.raises(BackendError, match=r"spans \d+ elements, and flex on cpu addresses 1000"):
        compare(short, case, CALL)


def test_a_cache_beyond_the_address_range_is_refused_at_build():
    with pytest.raises(BackendError, match=r"spans 4294967296 elements, and flex on cuda addresses 2147483647"):
        flex_settings(
            request("cuda", 16, (8, 8), 128, num_blocks=131072),
            FlexBackend().capabilities(DeviceFacts(platform="cuda", device_type="cuda")),
        )
