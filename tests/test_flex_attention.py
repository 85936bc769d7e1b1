"""Compiled flex against the reference. Shapes are few: on CPU every compiled variant costs seconds."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from makeready.attention_backends.flex import FlexBackend
from makeready.attention_backends.flex.impl import FlexAttention
from makeready.attention_backends.flex.mods import both, documents, prefix_lm
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
    ("head_size", "heads", "dtype", "placement"),
    [
        (64, (3, 3), "float32", "random"),
        (80, (6, 2), "bfloat16", "interleaved"),
        (96, (4, 2), "float16", "reversed"),
        (128, (8, 1), "bfloat16", "random"),
        (192, (16, 1), "float32", "interleaved"),
        (256, (8, 2), "float16", "reversed"),
    ],
)
def test_head_sizes_and_groups(device, head_size, heads, dtype, placement):
    """Ragged lengths; everything that no request holds is NaN."""
    impl = built(device, 16, heads, head_size, dtype)
    q_lens = [1, 1, 1] if device == "cpu" else [1, 70, 1]
    case = make_case(
        [200, 77, 16], q_lens, num_blocks=40, heads=heads, head_size=head_size, dtype=DTYPES[dtype],
        placement=placement, device=device,
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


def dense(case, call, mask, score=None):
    """Float32 attention of each request with a mask over positions, densely."""
    rows = []
    query, step = case.query.float(), case.step
    for request, (q_len, seq_len) in enumerate(zip(step.query_lens_host, step.seq_lens_host, strict=True)):
        q, query = query[:q_len], query[q_len:]
        group = q.shape[1] // case.keys[request].shape[1]
        k, v = (part.float().repeat_interleave(group, 1) for part in (case.keys[request], case.values[request]))
        scores = torch.einsum("qhd,khd->hqk", q, k) * call.scale
        at = (
            torch.arange(seq_len - q_len, seq_len, device=q.device)[:, None],
            torch.arange(seq_len, device=q.device)[None],
        )
        numbers = torch.tensor(request, device=q.device), torch.arange(q.shape[1], device=q.device)[:, None, None]
        if score is not None:
            scores = score(scores, *numbers, *at)
        scores = scores.masked_fill(~mask(*numbers, *at).broadcast_to(scores.shape), float("-inf"))
        rows.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(rows)


def custom(device, name):
    """(changes of the call, the mask as a whole, the score modifier) of one kind of attention."""

    def before(request, head, query, key):
        return key <= query

    if name == "prefix-LM":
        mask = prefix_lm(torch.tensor([20, 70, 3], dtype=torch.int32, device=device))
        return {"causal": False, "mask_mod": mask}, mask, None
    if name == "documents":
        ids = (torch.arange(160, device=device)[None] // torch.tensor([[7], [33], [50]], device=device)).int()
        return {"mask_mod": documents(ids)}, both(documents(ids), before), None

    def even_distance(request, head, query, key):
        return (query - key) % (2 + request + head % 2) == 0

    def nearer(score, request, head, query, key):
        return score - 0.1 * (query - key) * (1 + head) + request

    return {"mask_mod": even_distance, "score_mod": nearer}, both(even_distance, before), nearer


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["prefix-LM", "documents", "the user's own"])
def test_masks_in_positions_of_the_request(device, name):
    """Decode, chunk and short query; adversarial placement: positions are logical, not physical."""
    changes, mask, score = custom(device, name)
    call = replace(CALL, **changes)
    for placement in ("interleaved", "reversed"):
        case = make_case([150, 100, 9], [1, 40, 2], num_blocks=96, placement=placement, device=device)
        impl = built(device)
        out = impl.forward(case.query, case.key_cache, case.value_cache, impl.prepare(case.step), call)
        torch.testing.assert_close(out.float(), dense(case, call, mask, score), atol=2e-5, rtol=2e-5)
    before = impl.compile_count
    case = make_case([120, 90, 30], [1, 33, 2], num_blocks=96, device=device)
    impl.forward(case.query, case.key_cache, case.value_cache, impl.prepare(case.step), call)
    assert impl.compile_count == before


@pytest.mark.parametrize("device", DEVICES)
def test_alibi(device):
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], device=device)
    case = make_case([150, 100, 9], [1, 40, 1], num_blocks=96, device=device, placement="interleaved")
    compare(built(device), case, replace(CALL, alibi_slopes=slopes))


@pytest.mark.cuda
def test_no_compilation_as_batch_and_lengths_change():
    """One variant a way of asking: decodes, split decodes, drafts, prompts."""
    impl = FlexBackend().build(request("cuda"))
    steps = [
        ([5, 37], [1, 1]), ([700], [1]), ([5, 37, 48, 300], [1, 3, 1, 1]), ([300], [200]), ([128, 256], [128, 256]),
        ([300, 4, 130], [77, 1, 130]),
    ]  # fmt: skip
    for seq_lens, q_lens in steps:
        compare(impl, make_case(seq_lens, q_lens, num_blocks=96, device="cuda"), CALL)
    compiled = impl.compile_count
    assert compiled <= 6
    for seed in range(4):
        for count in (2, 3, 5, 8):
            case = make_case([17 + 31 * i + seed for i in range(count)], [1] * count, num_blocks=96, device="cuda")
            compare(impl, case, CALL)
        lens = [130 + seed, 90 + 7 * seed, 64]
        compare(impl, make_case(lens, [lens[0], 60 + seed, 1], num_blocks=96, device="cuda"), CALL)
    assert impl.compile_count == compiled


@pytest.mark.cuda
def test_a_captured_graph_follows_later_steps():
    from makeready.attention_backends.persistent import StepBuffers
    from makeready.cache.block_table import BlockTable

    impl = FlexBackend().build(request("cuda"))
    buffers = StepBuffers(
        max_num_seqs=8, max_num_batched_tokens=64, max_blocks=66, block_size=16, device=torch.device("cuda")
    )
    step = buffers.captured(4, 1056)
    first = make_case([5, 37, 700], [1, 1, 1], num_blocks=96, device="cuda")
    query = torch.zeros(4, *first.query.shape[1:], device="cuda")
    caches = first.key_cache, first.value_cache

    def run():
        return impl.forward(query, *caches, impl.prepare(step), CALL)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for seed in range(4):
        case = make_case([5 + seed, 37, 700 + 7 * seed][: 3 - seed % 2], [1] * (3 - seed % 2), num_blocks=96,
                         device="cuda", seed=seed)  # fmt: skip
        caches[0].copy_(case.key_cache)
        caches[1].copy_(case.value_cache)
        tables = []
        for row, length in zip(case.step.block_table.tolist(), case.step.seq_lens_host, strict=True):
            table = BlockTable(16)
            table.append(row[: -(-length // 16)])
            tables.append(table)
        buffers.fill(tables, [length - 1 for length in case.step.seq_lens_host], [1] * len(tables), rows=4)
        query[: len(tables)] = case.query
        graph.replay()
        expected = ReferenceAttention().forward(case.query, case.key_cache, case.value_cache, case.step, CALL)
        torch.testing.assert_close(out[: len(tables)], expected, atol=3e-3, rtol=3e-3)
        assert torch.isfinite(out).all()


@pytest.mark.cuda
def test_kv_beyond_2_to_the_31_elements():
    """Blocks at the far end of a view that 32 bits cannot address."""
    heads, size, block_size = (8, 8), 128, 64
    num_blocks = 2**31 // (2 * heads[1] * size * block_size) + 200
    base = request("cuda", block_size, heads, size, "bfloat16", num_blocks=num_blocks)
    device = replace(base.device, compute_capability=torch.cuda.get_device_capability())
    impl = FlexBackend().build(replace(base, device=device))
    cache = torch.zeros(num_blocks, block_size, 2, heads[1], size, dtype=torch.bfloat16, device="cuda")
    table = [num_blocks - 1, 1, num_blocks - 7, num_blocks // 2 + 3, num_blocks - 100]
    cache[table] = torch.randn(len(table), block_size, 2, heads[1], size, device="cuda").bfloat16()
    key, value = cache.unbind(2)
    for q_len in (1, 200):
        query = torch.randn(q_len, heads[0], size, device="cuda").bfloat16()
        step = step_of([300], [q_len], [table], block_size, "cuda")
        call = AttentionCall(scale=size**-0.5)
        out = impl.forward(query, key, value, impl.prepare(step), call)
        expected = ReferenceAttention().forward(query, key, value, step, call)
        torch.testing.assert_close(out.float(), expected.float(), atol=2e-2, rtol=2e-2)


def test_other_backends_refuse_masks_of_the_users_own():
    case = make_case([30], [1], num_blocks=96)
    call = replace(CALL, mask_mod=documents(torch.zeros(1, 30, dtype=torch.int32)))
    with pytest.raises(BackendError, match="reference has no masks or scores of the user's own; flex follows mask_mod"):
        ReferenceAttention().forward(case.query, case.key_cache, case.value_cache, case.step, call)
