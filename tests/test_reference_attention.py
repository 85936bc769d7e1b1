import pytest
import torch

from makeready.attention_backends.interface import AttentionCall
from makeready.attention_backends.reference import ReferenceBackend
from makeready.attention_backends.reference.impl import ReferenceAttention
from makeready.config import LAYOUTS
from makeready.device import DeviceFacts
from paged_cases import make_case

SEQ_LENS, Q_LENS = [1, 37, 48, 70], [1, 5, 48, 1]
DEVICE = DeviceFacts(platform="cpu", device_type="cpu")


def dense(case, call):
    """The same by torch's dense attention in float64, request after request."""
    parts, start = [], 0
    for key, value, q_len in zip(case.keys, case.values, case.step.query_lens_host, strict=True):
        q = case.query[start : start + q_len].double().transpose(0, 1)
        group = q.shape[0] // key.shape[1]
        k = key.double().transpose(0, 1).repeat_interleave(group, 0)
        v = value.double().transpose(0, 1).repeat_interleave(group, 0)
        logits = q @ k.transpose(1, 2) * call.scale
        if call.soft_cap is not None:
            logits = (logits / call.soft_cap).tanh() * call.soft_cap
        length = len(key)
        allowed = torch.ones(q_len, length, dtype=torch.bool)
        if call.causal:
            allowed = allowed.tril(length - q_len)
        if call.sliding_window is not None:
            allowed = allowed.triu(length - q_len - call.sliding_window + 1)
            allowed = allowed.tril(length - q_len + call.sliding_window - 1)
        logits = logits.masked_fill(~allowed, float("-inf"))
        if call.sinks is not None:  # one more key with this logit and a value of zero
            logits = torch.cat([logits, call.sinks.double()[:, None, None].expand(-1, q_len, 1)], -1)
            k, v = (torch.cat([x, torch.zeros_like(x[:, :1])], 1) for x in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(torch.zeros_like(q), k, v, attn_mask=logits, scale=1.0)
        parts.append(out.transpose(0, 1))
        start += q_len
    return torch.cat(parts)


def run(case, call):
    impl = ReferenceAttention()
    return impl.forward(case.query, case.key_cache, case.value_cache, impl.prepare(case.step), call)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("block_size", "head_size"), [(16, 16), (48, 80), (7, 24)])
def test_equals_dense_attention_and_reads_only_written_tokens(layout, block_size, head_size):
    case = make_case(SEQ_LENS, Q_LENS, layout=layout, block_size=block_size, head_size=head_size, clear=False)
    call = AttentionCall(scale=head_size**-0.5)
    torch.testing.assert_close(run(case, call).double(), dense(case, call), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "features",
    [
        {"sliding_window": 10},
        {"soft_cap": 2.0},
        {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0])},
        {"causal": False},
        {"causal": False, "sliding_window": 9},
        {"sliding_window": 20, "soft_cap": 5.0, "sinks": torch.tensor([0.5, -1.0, 3.0, 0.0])},
    ],
    ids=lambda features: "+".join(features),
)
@pytest.mark.parametrize("heads", [(4, 4), (4, 1)])
def test_features(features, heads):
    case = make_case(SEQ_LENS, Q_LENS, heads=heads, clear=False)
    call = AttentionCall(scale=0.25, **features)
    torch.testing.assert_close(run(case, call).double(), dense(case, call), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_half_dtypes_round_only_at_the_end(dtype, limit):
    case = make_case(SEQ_LENS, Q_LENS, dtype=dtype)
    call = AttentionCall(scale=0.25)
    out = run(case, call)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), dense(case, call), atol=limit, rtol=limit)


def test_gathered_with_another_value_width():
    case = make_case(SEQ_LENS, Q_LENS, head_size=24, head_size_v=16)
    call = AttentionCall(scale=0.3, sliding_window=30)
    out = ReferenceAttention().forward_gathered(case.query, case.keys, case.values, case.step, call)
    assert out.shape == (sum(Q_LENS), 4, 16)
    torch.testing.assert_close(out.double(), dense(case, call), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(run(case, call), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_request_does_not_see_its_batch(dtype):
    """Bitwise: the same request alone, with others before it, and placed elsewhere in the cache."""
    assert ReferenceBackend().capabilities(DEVICE).batch_invariant
    call = AttentionCall(scale=0.2)
    together = make_case([33, 129, 5], [7, 3, 1], heads=(6, 2), head_size=40, dtype=dtype)
    out = run(together, call)
    first = make_case([33], [7], heads=(6, 2), head_size=40, dtype=dtype)
    lone = ReferenceAttention().forward_gathered(
        together.query[7:10], together.keys[1:2], together.values[1:2],
        make_case([129], [3], heads=(6, 2), head_size=40).step, call,
    )  # fmt: skip
    assert torch.equal(lone, out[7:10])
    assert torch.equal(first.keys[0], together.keys[0])
    alone = ReferenceAttention().forward(together.query[:7].clone(), *paged_again(together, 0), call)
    assert torch.equal(alone, out[:7])


def paged_again(case, index):
    """Request ``index`` of ``case`` alone, in another cache with another block size and order."""
    q_len, seq_len = case.step.query_lens_host[index], case.step.seq_lens_host[index]
    other = make_case(
        [seq_len], [q_len], heads=(6, 2), head_size=40, dtype=case.query.dtype,
        block_size=48, placement="reversed", layout="cross_layer_HND",
    )  # fmt: skip
    for position in range(seq_len):
        block = other.step.block_table[0, position // 48]
        other.key_cache[block, position % 48] = case.keys[index][position]
        other.value_cache[block, position % 48] = case.values[index][position]
    return other.key_cache, other.value_cache, other.step


def test_declares_what_it_is():
    capabilities = ReferenceBackend().capabilities(DEVICE)
    assert capabilities.kernel_block_multiple == 1
    assert not capabilities.reads_unwritten_slots
    assert ReferenceBackend().probe(DEVICE).available
