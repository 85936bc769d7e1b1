"""Flex's path on CUDA: plans, block lists, packing and merging, on a device or in Triton's interpreter.

In the interpreter torch's kernel is played by plain torch that reads exactly the listed blocks, one row at a time.
"""

import os
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from makeready.attention_backends.flex import FlexBackend
from makeready.attention_backends.flex.impl import FlexAttention
from makeready.attention_backends.flex.settings import FlexSettings, flex_settings
from makeready.attention_backends.interface import AttentionCall, BuildRequest
from makeready.attention_backends.reference.impl import ReferenceAttention
from makeready.cache.specs import AttentionSpec
from makeready.config import AttentionConfig
from makeready.device import DeviceFacts
from makeready.errors import BackendError
from makeready.platforms.kernel_blocks import kernel_block_size
from paged_cases import make_case

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs triton with TRITON_INTERPRET=1 (test_flex_interpreted.py runs it so)",
)
CALL = AttentionCall(scale=0.25)


def listed(query, key, value, lists, mask, score, blocks, scale, options, lse):
    """What torch's kernel computes, from the lists alone: masked blocks first, and no mask on the whole ones."""
    assert blocks[0] % options["BLOCK_M"] == 0
    assert blocks[1] % options["BLOCK_N"] == 0
    assert lists.masked.stride() == lists.whole.stride()
    num_rows, heads, length, _ = query.shape
    out = torch.zeros_like(query)
    sums = torch.full((num_rows, heads, length), float("-inf"))
    for row in range(num_rows):
        counts = int(lists.masked_counts[row]), int(lists.whole_counts[row])
        assert counts[0] < lists.masked.shape[-1]
        assert counts[1] < lists.whole.shape[-1]
        if sum(counts) == 0:
            continue
        ids = torch.cat([part[row, 0, 0, :n] for part, n in zip((lists.masked, lists.whole), counts, strict=True)])
        tokens = (ids.long()[:, None] * blocks[1] + torch.arange(blocks[1])).reshape(-1)
        place = torch.arange(length)[:, None], tokens[None]
        for head in range(heads):
            at = torch.tensor(row), torch.tensor(head), *place
            kv_head = head * key.shape[1] // heads
            scores = query[row, head].float() @ key[0, kv_head][tokens].float().T * scale
            scores = scores if score is None else score(scores, *at)
            seen = mask(*at).expand(length, -1).clone()
            seen[:, counts[0] * blocks[1] :] = True
            scores = scores.masked_fill(~seen, float("-inf"))
            sums[row, head] = scores.logsumexp(-1)
            out[row, head] = torch.nan_to_num(scores.softmax(-1)) @ value[0, kv_head][tokens].float()
    return out, (sums if lse else None)


def build(monkeypatch, block_size=16, heads=(4, 2), num_blocks=96, **config):
    monkeypatch.setattr(FlexSettings, "extra_rows", property(lambda self: 0 if self.batch_invariant else 6))
    facts = DeviceFacts(platform="cuda", device_type="cuda", compute_capability=(9, 0))
    spec = AttentionSpec(num_query_heads=heads[0], num_kv_heads=heads[1], head_size=16, head_size_v=16, dtype="float32")
    capabilities = FlexBackend().capabilities(facts)
    request = BuildRequest(
        device=facts, spec=spec, dtype="float32", block_size=block_size,
        kernel_block_size=kernel_block_size(capabilities, block_size), num_blocks=num_blocks, max_num_seqs=8,
        max_num_batched_tokens=512, max_model_len=2112, config=AttentionConfig(**config),
    )  # fmt: skip
    impl = FlexAttention(flex_settings(request, capabilities))
    monkeypatch.setattr(impl, "_flex", listed)
    return impl


def compare(impl, case, call):
    metadata = impl.prepare(case.step)
    out = impl.forward(case.query, case.key_cache, case.value_cache, metadata, call)
    expected = ReferenceAttention().forward(case.query, case.key_cache, case.value_cache, case.step, call)
    assert out.is_contiguous()
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    return metadata


STEPS = {
    "decodes": ([5, 37, 48, 700], [1, 1, 1, 1]),
    "one decode": ([1000], [1]),
    "drafts": ([5, 37, 48, 700], [1, 3, 2, 4]),
    "mixed": ([700, 37, 148, 300], [1, 3, 100, 1]),
    "whole tiles": ([128, 256], [128, 256]),
    "ragged prompts": ([130, 257], [130, 257]),
    "a ragged chunk": ([230], [130]),
}


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_every_kind_of_step(monkeypatch, step, invariant):
    impl = build(monkeypatch, batch_invariant=invariant)
    metadata = compare(impl, make_case(*STEPS[step], num_blocks=96, placement="interleaved"), CALL)
    assert bool(metadata.runs) == (max(STEPS[step][1]) > 32 and not invariant)
    assert (metadata.decode is None) == (min(STEPS[step][1]) > 32)


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize(
    "features",
    [
        {"sliding_window": 33},
        {"sliding_window": 200, "soft_cap": 3.0},
        {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0])},
        {"alibi_slopes": torch.tensor([0.5, 0.1, 0.25, 0.0])},
        {"causal": False},
        {"causal": False, "sliding_window": 17},
    ],
    ids=lambda features: "+".join(features),
)
def test_features(monkeypatch, features, invariant):
    q_lens = [70, 3, 20] if features.get("causal") is False else [1, 3, 100, 1]
    seq_lens = q_lens if features.get("causal") is False else [700, 37, 148, 300]
    impl = build(monkeypatch, batch_invariant=invariant)
    compare(impl, make_case(seq_lens, q_lens, num_blocks=96, placement="reversed"), replace(CALL, **features))


@pytest.mark.parametrize(
    ("block_size", "heads", "layout"), [(528, (6, 2), "cross_layer_HND"), (2112, (4, 1), "cross_layer_NHD")]
)
def test_large_blocks_and_layouts(monkeypatch, block_size, heads, layout):
    impl = build(monkeypatch, block_size, heads, num_blocks=8)
    case = make_case(
        [700, 37, 1148, 300], [1, 3, 100, 1], block_size=block_size, heads=heads, num_blocks=8, layout=layout
    )
    compare(impl, case, CALL)


def test_padding_requests_of_a_bucket_leave_zeros(monkeypatch):
    impl = build(monkeypatch)
    case = make_case([700, 37, 1], [1, 1, 1], num_blocks=96)
    expected = ReferenceAttention().forward(case.query, case.key_cache, case.value_cache, case.step, CALL)
    case.step.seq_lens[2] = 0
    for hosts in ((700, 37, 0), (2112, 2112, 2112)):
        step = replace(case.step, seq_lens_host=hosts, captured=hosts[2] > 0)
        out = impl.forward(case.query, case.key_cache, case.value_cache, impl.prepare(step), CALL)
        torch.testing.assert_close(out[:2], expected[:2], atol=1e-5, rtol=1e-5)
        assert torch.equal(out[2], torch.zeros_like(out[2]))


@pytest.mark.parametrize("alive", [2, 3])
def test_steps_and_groups_that_are_alive_at_once_keep_their_lists(monkeypatch, alive):
    """Two steps in flight, or layer groups of one step: nobody's lists are overwritten."""
    impl = build(monkeypatch)
    cases = [make_case([300 + i, 37, 48], [1, 1, 1], num_blocks=96, seed=i) for i in range(alive)]
    compare(impl, cases[0], CALL)
    for _ in range(2):
        metadata = [impl.prepare(case.step) for case in cases]
        for case, prepared in zip(cases, metadata, strict=True):
            out = impl.forward(case.query, case.key_cache, case.value_cache, prepared, CALL)
            expected = ReferenceAttention().forward(case.query, case.key_cache, case.value_cache, case.step, CALL)
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        del metadata, prepared
    assert impl.buffer_bytes == impl.settings.buffer_bytes // 2 * alive


def test_buffers_are_what_the_settings_say_and_stay_where_they_are(monkeypatch):
    impl = build(monkeypatch)
    assert impl.buffer_bytes == 0
    places = set()
    for seed in range(4):
        metadata = compare(impl, make_case([300, 37, 48], [1, 1, 1], num_blocks=96, seed=seed), CALL)
        (rows,) = metadata.rows.values()
        places.add((rows.lists.whole.data_ptr(), rows.lists.whole.stride()))
    assert impl.buffer_bytes == impl.settings.buffer_bytes
    assert len(places) <= 2


def test_a_step_that_the_build_was_not_made_for(monkeypatch):
    impl = build(monkeypatch)
    case = make_case([300] * 9, [1] * 9, num_blocks=200)
    with pytest.raises(BackendError, match="a step of 9 requests is larger than the 8"):
        compare(impl, case, CALL)
