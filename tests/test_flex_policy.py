"""Flex without torch: rows, visited blocks, sizes, tiles and refusals."""

from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import makeready
from makeready.attention_backends.flex import FlexBackend
from makeready.attention_backends.flex.decode_plan import decode_rows, plan_decode
from makeready.attention_backends.flex.kernel_options import decode_options, page_options
from makeready.attention_backends.flex.rows import Row, split_rows, visited_blocks
from makeready.attention_backends.flex.settings import flex_settings
from makeready.attention_backends.flex.training import training_kernel
from makeready.attention_backends.interface import BuildRequest
from makeready.cache.specs import AttentionSpec
from makeready.config import AttentionConfig, EngineConfig
from makeready.device import DeviceFacts
from makeready.errors import BackendError, BlockSizeError, ConfigError
from makeready.platforms.kernel_blocks import kernel_block_size

SMALL = {
    "model_type": "llama", "hidden_size": 256, "num_attention_heads": 4, "head_dim": 64, "num_key_value_heads": 2,
    "num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 64, "dtype": "bfloat16",
}  # fmt: skip
CPU, CUDA = (DeviceFacts(platform=name, device_type=name) for name in ("cpu", "cuda"))


def resolve(device=CPU, config=None, heads=(4, 2), **changes):
    spec = AttentionSpec(
        num_query_heads=heads[0], num_kv_heads=heads[1], head_size=64, head_size_v=64, dtype="bfloat16"
    )
    base = BuildRequest(
        device=device, spec=spec, dtype="bfloat16", block_size=528, kernel_block_size=16, num_blocks=96,
        max_num_seqs=8, max_num_batched_tokens=512, max_model_len=1056, config=config or AttentionConfig(),
    )  # fmt: skip
    return flex_settings(replace(base, **changes), FlexBackend().capabilities(device))


@given(
    st.lists(st.tuples(st.integers(1, 90), st.integers(0, 50)), min_size=1, max_size=6),
    st.sampled_from([(1, 16, 64), (1, 16, 128), (1, 8)]),
)
def test_rows_hold_every_query_token_once_and_never_mix_requests(lens, row_lengths):
    q_lens = [q_len for q_len, _ in lens]
    seq_lens = [q_len + before for q_len, before in lens]
    seen = []
    for group in split_rows(q_lens, seq_lens, row_lengths):
        assert group.length in row_lengths
        for row in group.rows:
            assert 0 < row.count <= group.length
            first_token = sum(q_lens[: row.request])
            assert first_token <= row.token
            assert row.token + row.count <= first_token + q_lens[row.request]
            before = seq_lens[row.request] - q_lens[row.request]
            assert row.position == before + row.token - first_token
            seen += range(row.token, row.token + row.count)
    assert sorted(seen) == list(range(sum(q_lens)))


@settings(max_examples=300)
@given(
    st.integers(1, 20), st.integers(0, 60), st.integers(0, 20), st.sampled_from([1, 4, 16]), st.booleans(),
    st.one_of(st.none(), st.integers(1, 40)),
)  # fmt: skip
def test_visited_blocks_are_those_with_a_visible_key(count, position, after, block, causal, window):
    """Whole blocks are visible to every query, skipped ones to none; only masked blocks may be ragged."""
    seq_len = position + count + (0 if causal else after)
    span = visited_blocks(Row(0, 0, position, count, seq_len), block, causal, window)
    assert span.first <= span.full <= span.tail <= span.end

    def sees(query, key):
        ahead = key <= query if causal else window is None or key < query + window
        return key < seq_len and ahead and (window is None or key > query - window)

    for number in range(span.end + 3):
        keys = range(number * block, (number + 1) * block)
        pairs = [sees(query, key) for query in range(position, position + count) for key in keys]
        if span.full <= number < span.tail:
            assert all(pairs)
        elif not span.first <= number < span.end:
            assert not any(pairs)
        elif window is None or window >= block:
            assert any(pairs)
            assert not all(pairs)


@pytest.mark.parametrize(
    ("block_size", "kernel_block"),
    [(16, 16), (528, 16), (1040, 16), (1568, 32), (2096, 16), (2112, 64), (912, 16), (1024, 128), (48, 16)],
)
def test_kernel_blocks_divide_any_block_of_the_planner(block_size, kernel_block):
    assert kernel_block_size(FlexBackend().capabilities(CUDA), block_size) == kernel_block


def test_settings_of_the_user_are_respected():
    config = AttentionConfig(
        flex_attn_q_block_size=64, flex_attn_kv_block_size=32, flex_attn_block_m=32, flex_attn_block_n=16
    )
    resolved = resolve(CUDA, config, block_size=1568)
    assert (resolved.kernel_block_size, resolved.mask_query_block) == (32, 64)
    assert resolved.row_lengths == (1, 16, 64)
    for options in (page_options(resolved, 64, 64, 2), decode_options(resolved, 2, split=True)):
        assert (options["BLOCK_M"], options["BLOCK_N"]) == (32, 16)


@pytest.mark.parametrize(
    ("device", "config", "message"),
    [
        (CPU, AttentionConfig(flex_attn_kv_block_size=32), "32 does not divide the block size 528; what does: 16"),
        (CPU, AttentionConfig(flex_attn_block_m=64), "flex_attn_block_m 64 cannot be respected on CPU"),
        (CUDA, AttentionConfig(flex_attn_block_n=32), "flex_attn_block_n 32 .* divide the KV block 16"),
        (CUDA, AttentionConfig(flex_attn_kv_block_size=8), "8 is not a power of two of at least 16"),
        (CUDA, AttentionConfig(flex_attn_q_block_size=8), "flex_attn_q_block_size 8 is smaller than 16"),
    ],
)
def test_settings_that_cannot_be_respected_are_refused_with_both_numbers(device, config, message):
    with pytest.raises(BackendError, match=message):
        resolve(device, config)


def test_kernel_block_dtype_and_device_refusals():
    with pytest.raises(BackendError, match="kernel_block_size 48 is not a power of two"):
        resolve(CUDA, kernel_block_size=48)
    with pytest.raises(BackendError, match="dtype float16, and the cache holds bfloat16"):
        resolve(CPU, dtype="float16")
    with pytest.raises(BackendError, match="refuses device type privateuseone"):
        resolve(DeviceFacts(platform="vendor", device_type="privateuseone"))


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("group_size", [1, 3, 8, 48])
@pytest.mark.parametrize("head_size", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gpu_tiles_divide_the_mask_blocks_and_fit_in_shared_memory(group_size, head_size, dtype, invariant):
    element_bytes = 4 if dtype == "float32" else 2
    spec = AttentionSpec(
        num_query_heads=group_size, num_kv_heads=1, head_size=head_size, head_size_v=head_size, dtype=dtype
    )
    for kernel_block in (16, 32, 64, 128):
        resolved = resolve(
            CUDA, AttentionConfig(batch_invariant=invariant), spec=spec, dtype=dtype, block_size=kernel_block,
            kernel_block_size=kernel_block,
        )  # fmt: skip
        every = [page_options(resolved, 128, head_size, element_bytes)]
        every += [decode_options(resolved, group_size, split=split) for split in (False, True)]
        for options in every:
            rows, columns = options["BLOCK_M"], options["BLOCK_N"]
            assert resolved.mask_query_block % rows == 0
            assert kernel_block % columns == 0
            assert min(rows, columns) >= 16
            padded = 1 << (head_size - 1).bit_length()
            assert (rows + 2 * options["num_stages"] * columns) * padded * element_bytes <= 227 * 1024
        if invariant:
            same = [{name: options[name] for name in ("BLOCK_M", "BLOCK_N", "num_warps")} for options in every]
            assert same[0] == same[1] == same[2]


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(0, 500)), min_size=1, max_size=8),
    st.sampled_from([(4, 2), (32, 2), (6, 2)]),
    st.booleans(),
)
@example([(17, 0)], (6, 2), False)  # 17 tokens would be a unit of 32, with a group of 3 beyond 64 rows
@example([(16, 0)], (6, 2), False)
def test_short_queries_are_decodes_and_get_a_row_each_at_least(lens, heads, invariant):
    resolved = resolve(CUDA, AttentionConfig(batch_invariant=invariant), heads=heads)
    query_lens = [count for count, _ in lens]
    plan = plan_decode(query_lens, [count + before for count, before in lens], resolved)
    if plan is None:
        fewest = min(query_lens)
        assert fewest > 1
        assert invariant or (1 << (fewest - 1).bit_length()) * (heads[0] // heads[1]) > 64
        return
    assert all(query_lens[request] <= plan.length for request in plan.requests)
    assert plan.length * (heads[0] // heads[1]) <= 64
    assert max(2, plan.units) <= plan.rows <= resolved.max_decode_rows
    assert plan.whole_step == (set(query_lens) == {1})
    if invariant:
        assert (plan.length, plan.split) == (1, False)


def test_large_batches_of_short_sequences_are_not_split_and_others_are():
    resolved = resolve(CUDA, heads=(32, 8), max_num_seqs=256)
    assert decode_rows(64, 4096, resolved) == 64
    assert decode_rows(256, 1024, resolved) == 256
    assert decode_rows(64, 131072, resolved) > 64
    narrow = resolve(CUDA, heads=(32, 2), max_num_seqs=256, block_size=64, kernel_block_size=64)
    assert decode_rows(64, 8192, narrow) == 64
    assert decode_rows(32, 8192, narrow) > 32
    assert decode_rows(1, 131072, resolved) > 60
    assert decode_rows(1, 131072, replace(resolved, batch_invariant=True)) == 2


def test_buffers_are_small_beside_the_cache():
    """1024 requests of 128k tokens, blocks of 16: under 1 % of the cache, at any layer count."""
    resolved = resolve(
        CUDA, heads=(32, 8), block_size=16, num_blocks=16384, max_num_seqs=1024, max_num_batched_tokens=8192,
        max_model_len=131072,
    )  # fmt: skip
    cache = 1024 * 131072 * 2 * 8 * 64 * 2
    assert resolved.buffer_bytes < cache / 100
    blocks = 131072 // 16
    assert resolved.buffer_bytes < 2 * 4 * (1024 + 66 + 64) * (blocks + 64) + 8 * 16384 + 65536
    assert resolved.run_bytes == 131072 * 2 * 8 * 64 * 2
    assert resolved.run_bytes < cache / 100


@settings(max_examples=300)
@given(
    st.integers(1, 60), st.integers(0, 99), st.sampled_from([4, 16]), st.sampled_from([8, 16, 32]),
    st.sampled_from([1, 2]), st.one_of(st.none(), st.integers(1, 80)),
)  # fmt: skip
def test_every_query_of_an_aligned_tile_meets_its_blocks_in_the_same_order(count, before, block, align, each, window):
    """Cut anywhere, a query sees the blocks that the whole tile would show it, in that order."""
    tile = Row(0, 0, before // align * align, align, before + count)
    whole = visited_blocks(tile, each * block, True, window)

    def order(span, each):
        ragged = [*range(span.first, span.full), *range(span.tail, span.end)]
        marked = [(number, True) for number in ragged] + [(number, False) for number in range(span.full, span.tail)]
        return [(number * each + part, masked) for number, masked in marked for part in range(each)]

    (group,) = split_rows([count], [before + count], (align,), align)
    row = group.rows[0]
    assert row.position // align == (row.position + row.count - 1) // align
    span = visited_blocks(row, block, True, window, (align, each * block))
    assert order(span, 1) == [entry for entry in order(whole, each) if span.first <= entry[0] < span.end]


def test_batches_are_padded_to_few_sizes():
    assert [resolve(CPU).batch_rows(rows) for rows in (1, 8, 9, 64, 65)] == [8, 8, 64, 64, 512]
    assert [resolve(CUDA).batch_rows(rows) for rows in (1, 2, 3, 65)] == [2, 2, 3, 65]


def test_what_is_declared_on_each_device():
    flex = FlexBackend()
    assert not flex.capabilities(CPU).sinks
    assert flex.capabilities(CUDA).sinks
    assert flex.capabilities(CPU).max_view_elements is None
    assert flex.capabilities(CUDA).max_view_elements == 2**31 - 1
    fixed = replace(CUDA, versions=(("torch", "2.14.1+cu130"),))
    assert flex.capabilities(fixed).max_view_elements is None
    assert flex.capabilities(replace(CUDA, versions=(("torch", "2.11.0"),))).max_view_elements == 2**31 - 1
    assert flex.capabilities(CPU).reads_unwritten_slots
    vendor = DeviceFacts(platform="vendor", device_type="privateuseone")
    assert flex.capabilities(vendor).dtypes == frozenset()
    probe = flex.probe(vendor)
    assert not probe.available
    assert "not privateuseone" in probe.reason
    assert flex.probe(CPU).available


@pytest.mark.parametrize(
    ("option", "value"), [("dtype", "fp8"), ("device_type", "xpu"), ("kernel_block_size", 24), ("kernel_block_size", 0)]
)
def test_a_trainer_is_refused_what_serving_would_refuse(option, value):
    asked = {"head_size": 64, "dtype": "float32", "kernel_block_size": 16, "device_type": "cpu", option: value}
    with pytest.raises(BackendError, match=f"{option} {value!r} has no batch-invariant flex kernel"):
        training_kernel(**asked)


@pytest.mark.parametrize("option", ["flex_attn_block_m", "flex_attn_block_n", "flex_attn_kv_block_size"])
def test_blocks_below_a_matrix_product_are_refused_as_settings(option):
    with pytest.raises(ConfigError, match=f"{option} 8 is not a power of two of at least 16, .*nearest: 16"):
        EngineConfig.from_options(**{option: 8})
    with pytest.raises(ConfigError, match=f"{option} 48 is not a power of two .*nearest: 32, 64"):
        EngineConfig.from_options(**{option: 48})


def test_a_plan_refuses_tiles_that_no_kernel_follows():
    with pytest.raises(BackendError, match="flex_attn_block_n 32 cannot be respected on CPU"):
        makeready.plan(SMALL, platform="cpu", backend="flex", flex_attn_block_n=32)
    with pytest.raises(BackendError, match="flex_attn_block_n 256 is more than the 128 tokens"):
        makeready.plan(SMALL, platform="cuda", backend="flex", flex_attn_block_n=256)


def test_a_kernel_tile_is_a_constraint_of_the_block():
    decided = makeready.plan(SMALL, platform="cuda", backend="flex", flex_attn_block_n=64)
    assert (decided.block_size, decided.decision.kernel_block_sizes["flex"]) == (64, 64)
    with pytest.raises(BlockSizeError, match="flex_attn_block_n needs a multiple of 64"):
        makeready.plan(SMALL, platform="cuda", backend="flex", flex_attn_block_n=64, block_size=16)


def test_tiles_of_flex_that_nobody_follows_are_warned_of():
    idle = makeready.plan(SMALL, platform="cuda", flex_attn_block_m=32)
    assert idle.layers[0].backend == "flash"
    assert "flex_attn_block_m 32 changes nothing: flex serves no layer." in idle.warnings
    assert not makeready.plan(SMALL, platform="cuda", backend="flex", flex_attn_block_m=32).warnings
