"""The reference mixers against a token-by-token run, and against transformers' own functions."""

from __future__ import annotations

import pytest
import torch

from makeready.errors import BackendError, RequestError
from makeready.hybrid.mixers.batch import StateBatch
from makeready.hybrid.mixers.reference.kernels import ReferenceMixers
from mixer_cases import (
    Mixer,
    assert_other_pages_untouched,
    clone_pages,
    make_batch,
    make_pages,
    part,
    relative_error,
    token_by_token,
)

KERNELS = ReferenceMixers()


@pytest.mark.parametrize("kind", Mixer.kinds)
def test_ragged_step_equals_token_by_token(kind):
    mixer = Mixer(kind)
    lens = [1, 19, 3, 1, 33, 2, 16]
    batch = make_batch(lens, fresh=[0, 1, 5])
    state = make_pages(batch, mixer.state_shape)
    before, expected_state = clone_pages(state), clone_pages(state)
    inputs = mixer.inputs(sum(lens))
    out = mixer.run(KERNELS, inputs, state, batch)

    start = 0
    for index, length in enumerate(lens):
        slot = int(batch.slots[index])
        wanted = token_by_token(
            mixer, part(inputs, start, start + length), expected_state, slot, bool(batch.fresh[index])
        )
        assert relative_error(out[start : start + length], wanted) < 2e-5
        assert relative_error(state[slot], expected_state[slot]) < 2e-5
        start += length
    assert_other_pages_untouched(before, state, batch)


@pytest.mark.parametrize("kind", Mixer.kinds)
def test_long_prefill_equals_chunked_prefill(kind):
    mixer = Mixer(kind)
    inputs = mixer.inputs(50)
    whole = make_batch([50], fresh=[0], slots=[2])
    state = make_pages(whole, mixer.state_shape)
    chunked_state = clone_pages(state)
    out = mixer.run(KERNELS, inputs, state, whole)
    chunks, start = [], 0
    for length in (1, 20, 2, 27):
        batch = make_batch([length], fresh=[0] if start == 0 else [], slots=[2])
        chunks.append(mixer.run(KERNELS, part(inputs, start, start + length), chunked_state, batch))
        start += length
    assert relative_error(torch.cat(chunks), out) < 2e-5
    assert relative_error(chunked_state[2], state[2]) < 2e-5


@pytest.mark.parametrize("kind", Mixer.kinds)
def test_padding_rows_touch_nothing_and_are_zeros(kind):
    mixer = Mixer(kind)
    batch = make_batch([4, 1, 1, 3], slots=[-1, 1, -1, 0], pages=4)
    state = make_pages(batch, mixer.state_shape)
    before = clone_pages(state)
    inputs = mixer.inputs(9)
    for value in inputs.values():
        value[:4] = float("nan")
    out = mixer.run(KERNELS, inputs, state, batch)
    assert torch.equal(out[:4], torch.zeros_like(out[:4]))
    assert torch.equal(out[5:6], torch.zeros_like(out[5:6]))
    assert bool(out.isfinite().all())
    assert_other_pages_untouched(before, state, batch)


def test_mamba2_equals_transformers():
    module = pytest.importorskip("transformers.models.falcon_h1.modeling_falcon_h1")
    mixer = Mixer("mamba2_groups")
    inputs, fixed = mixer.inputs(21), mixer.fixed
    batch = make_batch([21], slots=[1])
    state = make_pages(batch, mixer.state_shape)
    start = state[1:2].clone()
    more = {"D": fixed["D"], "dt_bias": fixed["dt_bias"], "dt_softplus": True}
    out = KERNELS.mamba2(
        *(inputs[name] for name in ("x", "dt")), fixed["A"], inputs["B"], inputs["C"], state, batch,
        dt_limit=(0.1, 2.0), **more,
    )  # fmt: skip
    wanted, final = module.mamba2_chunk_scan.__wrapped__(
        *(inputs[name].unsqueeze(0) for name in ("x", "dt")), fixed["A"],
        *(inputs[name].unsqueeze(0) for name in ("B", "C")), 8,
        initial_states=start, return_final_states=True, dt_limit=(0.1, 2.0), **more,
    )  # fmt: skip
    assert relative_error(out, wanted[0]) < 1e-6
    assert relative_error(state[1], final[0]) < 1e-6

    one = mixer.inputs(1)
    states = state[1:2].clone()
    wide = lambda value: value[:, None].expand(-1, mixer.s["P"])  # noqa: E731
    step = module.mamba2_selective_state_update.__wrapped__(
        states, one["x"], one["dt"][..., None].expand(-1, -1, mixer.s["P"]),
        fixed["A"][:, None, None].expand(*state.shape[1:]), one["B"], one["C"], wide(fixed["D"]),
        z=one["z"], dt_bias=wide(fixed["dt_bias"]), dt_softplus=True,
    )  # fmt: skip
    decode = make_batch([1], slots=[1])
    out = KERNELS.mamba2(
        one["x"], one["dt"], fixed["A"], one["B"], one["C"], state, decode,
        z=one["z"], dt_limit=(0.1, 0.2), decode_dt_limit=(0.0, float("inf")), **more,
    )  # fmt: skip
    assert relative_error(out, step) < 1e-6
    assert relative_error(state[1], states[0]) < 1e-6


def test_mamba1_equals_transformers_from_an_empty_state():
    module = pytest.importorskip("transformers.models.jamba.modeling_jamba")
    mixer = Mixer("mamba1")
    inputs, fixed = mixer.inputs(13), mixer.fixed
    batch = make_batch([13], slots=[1], fresh=[0])
    state = make_pages(batch, mixer.state_shape)
    out = mixer.run(KERNELS, inputs, state, batch)
    wanted, final = module.mamba_selective_scan.__wrapped__(
        *(inputs[name].T.unsqueeze(0) for name in ("x", "dt")), fixed["A1"],
        *(inputs[name].T.unsqueeze(0) for name in ("B", "C")), D=fixed["D1"], z=inputs["z"].T.unsqueeze(0),
        delta_bias=fixed["dt_bias1"], delta_softplus=True, return_last_state=True,
    )  # fmt: skip
    assert relative_error(out, wanted[0].T) < 1e-6
    assert relative_error(state[1], final[0]) < 1e-6


@pytest.mark.parametrize(
    ("kind", "module", "chunked", "stepped"),
    [
        ("gdn", "qwen3_next.modeling_qwen3_next", "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"),
        ("kda", "kimi_linear.modeling_kimi_linear", "chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"),
    ],
)
def test_delta_rules_equal_transformers(kind, module, chunked, stepped):
    module = pytest.importorskip(f"transformers.models.{module}")
    mixer = Mixer(kind)
    for tokens, name in ((37, chunked), (5, stepped)):
        inputs = mixer.inputs(tokens)
        batch = make_batch([tokens], slots=[1])
        state = make_pages(batch, mixer.state_shape)
        start = state[1:2].clone()
        out = mixer.run(KERNELS, inputs, state, batch)
        q, k, v, g, beta = (inputs[part].unsqueeze(0) for part in ("q", "k", "v", "g", "beta"))
        if kind == "gdn":  # transformers 5.17 wants as many key heads as value heads
            q, k = (side.repeat_interleave(mixer.s["H"] // mixer.s["Hk"], dim=2) for side in (q, k))
        wanted, final = getattr(module, name).__wrapped__(
            q, k, v, g=g, beta=beta, initial_state=start, output_final_state=True, use_qk_l2norm_in_kernel=True
        )
        assert relative_error(out, wanted[0]) < 2e-6
        assert relative_error(state[1], final[0]) < 2e-6


def test_convolution_equals_transformers():
    module = pytest.importorskip("transformers.models.falcon_h1.modeling_falcon_h1")
    mixer = Mixer("conv")
    inputs, fixed = mixer.inputs(9)["x"].to(torch.bfloat16), mixer.fixed
    weight, bias = fixed["weight"].to(torch.bfloat16), fixed["bias"].to(torch.bfloat16)
    first, later = make_batch([9], slots=[1], fresh=[0]), make_batch([1], slots=[1])
    state = make_pages(first, mixer.state_shape, dtype=torch.bfloat16)
    out = KERNELS.causal_conv(inputs, weight, bias, state, first, activation="silu")
    wanted = module.causal_conv1d_fn.__wrapped__(inputs.T.unsqueeze(0), weight, bias, "silu")
    assert torch.equal(out, wanted[0].T)
    assert torch.equal(state[1], inputs[-4:].T)

    states = state[1:2].clone()
    one = mixer.inputs(1)["x"].to(torch.bfloat16)
    out = KERNELS.causal_conv(one, weight, bias, state, later, activation="silu")
    wanted = module.causal_conv1d_update.__wrapped__(one.unsqueeze(-1), states, weight, bias, "silu")
    assert torch.equal(out, wanted[..., 0])
    assert torch.equal(state[1], states[0])


def test_steps_that_contradict_themselves_are_refused():
    mixer = Mixer("mamba2")
    batch = make_batch([2, 1])
    state = make_pages(batch, mixer.state_shape)
    inputs = mixer.inputs(4)
    with pytest.raises(RequestError, match="counts 3 tokens of 2 requests, and the step has 4"):
        mixer.run(KERNELS, inputs, state, batch)
    decode = StateBatch(
        query_start=batch.query_start, slots=batch.slots, fresh=batch.fresh, max_query_len=1, decode_only=True
    )
    with pytest.raises(RequestError, match="2 decodes has 2 tokens, not 4"):
        mixer.run(KERNELS, inputs, state, decode)
    with pytest.raises(BackendError, match=r"state has shape \(.*\); expected \('any', 4, 16, 16\)"):
        mixer.run(KERNELS, mixer.inputs(3), state[:, :3], batch)
    conv = Mixer("conv")
    with pytest.raises(BackendError, match="state has 2 columns; expected at least 3"):
        conv.run(KERNELS, conv.inputs(3), make_pages(batch, (conv.s["C"], 2)), batch)


def test_lens_are_read_from_the_device_where_the_host_does_not_know():
    assert make_batch([3, 1, 2], host=False).lens() == (3, 1, 2)
