"""ReplaySSM's rings: their shapes and bytes, what they do to pages and capacity, and every refusal."""

from __future__ import annotations

import pytest

import makeready
from makeready.errors import CapacityError, ConfigError
from makeready.hybrid.model_specs import read_model
from makeready.hybrid.replay_rings import Replay

NANO = "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"
"""64 heads of 64, 8 groups, state size 128."""


def rings(tp=1, speculative=0, **replay):
    spec = read_model(
        NANO, engine="vllm", tensor_parallel_size=tp, num_speculative_tokens=speculative, replay=Replay(**replay)
    )
    return {tensor.name: (tensor.shape, tensor.dtype) for tensor in spec.state_layers[0].spec.states}


def test_three_rings_follow_the_state():
    found = rings()
    assert list(found) == ["conv", "recurrent", "replay_x", "replay_dt", "replay_B"]
    assert found["replay_x"] == ((64, 16, 64), "bfloat16")
    assert found["replay_dt"] == ((64, 16), "float32")
    assert found["replay_B"] == ((8, 16, 128), "bfloat16")


def test_they_are_split_over_ranks_and_as_long_as_asked():
    found = rings(tp=4, buffer_len=24)
    assert found["replay_x"][0] == (16, 24, 64)
    assert found["replay_dt"][0] == (16, 24)
    assert found["replay_B"][0] == (2, 24, 128)


def test_flashinfer_keeps_what_is_being_verified_in_the_ring():
    assert rings(backend="flashinfer")["replay_x"][0] == (64, 17, 64)
    found = rings(backend="flashinfer", speculative=3, buffer_len=12)
    assert found["replay_dt"][0] == (64, 12 + 1 + 3)
    assert found["conv"][0] == (3 + 3, 6144)


def test_without_the_setting_nothing_changes():
    assert read_model(NANO, engine="vllm").state_layers[0].spec.state_bytes == 2134016


def test_pages_and_capacity_count_them():
    """16 rows of 64 x 64 bf16, 64 fp32 and 8 x 128 bf16."""
    extra = 16 * (64 * 64 * 2 + 64 * 4 + 8 * 128 * 2)
    off, on = (makeready.plan(NANO, platform="cuda", memory_bytes=8 << 30, use_replayssm=x) for x in (False, True))
    assert on.decision.state_raw_bytes == off.decision.state_raw_bytes + extra
    assert on.block_size == 16 * -(-(2134016 + extra) // (16 * 1024))
    assert on.page_bytes == on.block_size * 1024 >= on.decision.state_raw_bytes
    assert on.strategy.state_bytes == 23 * (2134016 + extra)
    assert on.capacity.num_blocks < off.capacity.num_blocks
    assert [state["name"] for state in on.to_dict()["states"]][2:] == ["replay_x", "replay_dt", "replay_B"]


def test_draft_tokens_keep_states_of_their_own_unless_rings_do():
    """vLLM holds 1 + s state blocks per request and group; ReplaySSM verifies the window from one."""
    drafts = {"platform": "cuda", "memory_bytes": 8 << 30, "num_speculative_tokens": 3}
    plain = makeready.plan(NANO, **drafts)
    replayed = makeready.plan(NANO, **drafts, use_replayssm=True, mamba_backend="flashinfer")
    states = sum(group.is_state for group in plain.groups)
    assert plain.holding.request_need(plain.groups, 512)[0] == 4 * states
    assert replayed.holding.request_need(replayed.groups, 512)[0] == states
    assert replayed.capacity.concurrency[512] > 2 * plain.capacity.concurrency[512]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engine": "transformers"}, "engine transformers keeps no rings"),
        ({"model": "ibm-granite/granite-4.0-h-tiny"}, "nemotron_h only, and the model is a granitemoehybrid"),
        ({"model": "moonshotai/Kimi-Linear-48B-A3B-Instruct"}, "nemotron_h only, and the model is a kimi_linear"),
        ({"model": "Qwen/Qwen3-8B"}, "a qwen3 has no mamba2 states"),
        ({"mamba_backend": "flashinfer", "replayssm_buffer_len": 17}, "buffer_len 17 is more than the 16"),
        ({"mamba_backend": "flashinfer", "mamba_cache_mode": "align"}, "mamba_cache_mode is align"),
        ({"num_speculative_tokens": 2}, "num_speculative_tokens 2 is verified against rings by .* flashinfer only"),
        (
            {"mamba_backend": "flashinfer", "num_speculative_tokens": 5, "replayssm_buffer_len": 5},
            "buffer_len 5 is less than the 6 tokens that num_speculative_tokens 5 verifies",
        ),
    ],
)
def test_refusals_say_what_stands_against_it(options, words):
    with pytest.raises(ConfigError, match=words):
        makeready.plan(**{"model": NANO, "platform": "cuda", "use_replayssm": True, **options})


@pytest.mark.parametrize(
    "options", [{"replayssm_buffer_len": 0}, {"mamba_backend": "cpu"}, {"replayssm_buffer_len": True}]
)
def test_settings_are_checked_also_where_they_are_not_used(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        makeready.plan(NANO, platform="cuda", **options)


def test_modes_that_keep_states_are_planned_with_triton():
    plan = makeready.plan(NANO, platform="cuda", use_replayssm=True, mamba_cache_mode="align")
    assert plan.decision.mamba_block_size == plan.block_size


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"replayssm_buffer_len": 8}, "replayssm_buffer_len 8 changes nothing without use_replayssm"),
        ({"mamba_backend": "flashinfer"}, "mamba_backend flashinfer changes nothing without use_replayssm"),
        ({"extra_retained_tokens": 2}, "extra_retained_tokens 2 changes nothing without free_out_of_window"),
    ],
)
def test_a_setting_that_changes_nothing_is_said(options, words):
    plan = makeready.plan(NANO, platform="cuda", **options)
    assert any(words in warning for warning in plan.warnings)


def test_what_the_shortest_request_takes_has_its_draft_states():
    plan = makeready.plan(NANO, platform="cuda", num_speculative_tokens=3, memory_bytes=2**30)
    assert plan.capacity is not None
    said = "takes 211.97 MiB: (5 groups + 12 draft states) x 12.47 MiB"
    assert any(said in warning for warning in plan.warnings)
    assert plan.capacity.floor_bytes_per_request == 17 * plan.shape.block_bytes
    with pytest.raises(CapacityError, match="4 groups of states 3 more for draft tokens, and one block is the null"):
        makeready.plan(NANO, platform="cuda", num_speculative_tokens=3, memory_bytes=2**26)
