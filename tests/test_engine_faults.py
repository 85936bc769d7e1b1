"""What the engine refuses, and what it does when a request, or the model, ends early."""

from __future__ import annotations

import pytest
import torch

from engine_setup import MAX_MODEL_LEN, make_ready, spec_of
from makeready.cache.specs import LayerGroup
from makeready.engines.transformers import attention
from makeready.engines.transformers.engine import Progress, SamplingParams, TransformersEngine
from makeready.engines.transformers.families import check_version, traits_of
from makeready.engines.transformers.mamba1 import scan_module
from makeready.engines.transformers.probe import check_plan
from makeready.errors import (
    BackendError,
    ConfigError,
    IntegrityError,
    RequestError,
    UnsupportedModelError,
)
from tiny_models import tiny_model

PROMPT = [5, 9, 11, 40, 77]
SEEDED = SamplingParams(max_new_tokens=12, temperature=0.9, top_k=40, top_p=0.95, seed=7, ignore_eos=True)


@pytest.fixture(scope="module")
def model():
    return tiny_model("bamba")


@pytest.fixture
def engine(model):
    engine = TransformersEngine(model, None, make_ready(model, max_num_batched_tokens=16), poison_freed=True)
    yield engine
    engine.pool.check_integrity()
    engine.close()
    assert engine.pool.num_free == engine.pool.capacity


def greedy(count: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, ignore_eos=True)


def test_an_aborted_request_gives_its_blocks_back(engine):
    ids = [engine.add_request(PROMPT, greedy(20)), engine.add_request(list(range(3, 60)), greedy(20))]
    engine.step()
    engine.step()
    assert engine.pool.num_free < engine.pool.capacity
    for request_id in ids:
        output = engine.abort(request_id)
        assert output.finished
        assert output.finish_reason == "abort"
    assert engine.pool.num_free == engine.pool.capacity
    assert not engine.has_requests()
    with pytest.raises(RequestError, match="request 'request-0' is not live"):
        engine.abort("request-0")


def test_an_abort_leaves_the_others_alone(engine):
    alone = engine.generate([PROMPT], greedy(12))[0].token_ids
    kept, gone = engine.add_request(PROMPT, greedy(12)), engine.add_request([8, 8, 8], greedy(12))
    tokens = []
    for step in range(20):
        if step == 4:
            engine.abort(gone)
        tokens += [t for output in engine.step() if output.request_id == kept for t in output.new_token_ids]
    assert tuple(tokens) == alone


@pytest.mark.parametrize(
    ("prompt", "params", "error", "message"),
    [
        ([], greedy(1), RequestError, "the prompt is empty"),
        (
            [3] * MAX_MODEL_LEN,
            greedy(1),
            RequestError,
            "256 tokens and max_new_tokens 1 make 257, more than",
        ),
        ([3, 128], greedy(1), RequestError, "token 128 is not in the vocabulary of 128 tokens"),
        ("text", greedy(1), RequestError, "the engine has no tokenizer"),
        (5, greedy(1), RequestError, "the prompt 5 is neither text nor token ids"),
        (b"text", greedy(1), RequestError, "the prompt b'text' is neither text nor token ids"),
        ([3], SamplingParams(max_new_tokens=0), RequestError, "max_new_tokens 0 cannot be used; give a whole number"),
        ([3], SamplingParams(temperature=-1.0), RequestError, "temperature -1.0 cannot be used; give 0, or"),
        ([3], SamplingParams(top_p=0.0), RequestError, "top_p 0.0 cannot be used; give a number above 0"),
        ([3], SamplingParams(seed=-1), RequestError, "seed -1 cannot be used"),
    ],
)
def test_a_bad_request_is_refused_and_leaves_nothing_behind(engine, prompt, params, error, message):
    with pytest.raises(error, match=message):
        engine.add_request(prompt, params)
    assert not engine.has_requests()


def test_a_bad_prompt_takes_its_whole_call_back(engine):
    with pytest.raises(RequestError, match="the prompt is empty"):
        engine.generate([PROMPT, []], greedy(2))
    assert not engine.has_requests()
    with pytest.raises(RequestError, match="2 prompts came with 1 params"):
        engine.generate([PROMPT, PROMPT], [greedy(2)])


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch(engine):
    alone = engine.generate([PROMPT], SEEDED)[0].token_ids
    others = [[3, 4], list(range(3, 40)), [9]]
    batch = engine.generate([*others, PROMPT], [greedy(9), SEEDED, greedy(5), SEEDED])
    assert batch[3].token_ids == alone
    assert engine.generate([PROMPT], greedy(12))[0].token_ids != alone
    without = SamplingParams(max_new_tokens=12, temperature=0.9, ignore_eos=True)
    assert len({engine.generate([PROMPT], without)[0].token_ids for _ in range(3)}) > 1


def test_top_k_of_one_is_greedy(engine):
    one = SamplingParams(max_new_tokens=8, temperature=2.0, top_k=1, ignore_eos=True)
    assert engine.generate([PROMPT], one)[0].token_ids == engine.generate([PROMPT], greedy(8))[0].token_ids


def test_a_stop_token_ends_a_request_and_is_part_of_it(engine):
    tokens = engine.generate([PROMPT], greedy(10))[0].token_ids
    stop = tokens[4]
    stopped = engine.generate([PROMPT], SamplingParams(max_new_tokens=10, stop_token_ids=(stop,), ignore_eos=True))[0]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == tokens[: tokens.index(stop) + 1]


@pytest.mark.parametrize("several", [False, True])
def test_the_end_of_sequence_is_the_models(engine, model, monkeypatch, several):
    tokens = engine.generate([PROMPT], greedy(10))[0].token_ids
    eos = [127, tokens[4]] if several else tokens[4]
    monkeypatch.setattr(model.generation_config, "eos_token_id", eos)
    engine.close()
    ends = TransformersEngine(model, None, make_ready(model))
    done = ends.generate([PROMPT], SamplingParams(max_new_tokens=10))[0]
    assert done.finish_reason == "stop"
    assert done.token_ids == tokens[: tokens.index(tokens[4]) + 1]
    assert ends.generate([PROMPT], greedy(10))[0].token_ids == tokens
    ends.close()


def test_progress_and_outputs_of_others_are_not_lost(engine):
    other = engine.add_request([7, 8], greedy(3))
    seen: list[Progress] = []
    engine.generate([PROMPT], greedy(6), seen.append)
    assert seen[-1] == Progress(finished=1, total=1, tokens=6)
    waiting = engine.step()
    assert [output.request_id for output in waiting] == [other] * 3
    assert [output.finished for output in waiting] == [False, False, True]


def test_leaving_a_stream_aborts_it(engine):
    stream = engine.stream(PROMPT, greedy(20))
    assert next(stream).new_token_ids
    stream.close()
    assert engine.pool.num_free == engine.pool.capacity


def test_if_the_model_raises_the_step_is_done_again(engine, model, monkeypatch):
    expected = engine.generate([PROMPT, [9, 9]], greedy(8))
    ids = [engine.add_request(PROMPT, greedy(8)), engine.add_request([9, 9], greedy(8))]
    tokens: dict[str, list[int]] = {request_id: [] for request_id in ids}
    forward = type(model).forward

    def failing(*args, **kwargs):
        forward(*args, **kwargs)
        raise MemoryError("out of memory")

    for step in range(30):
        if step == 3:
            monkeypatch.setattr(type(model), "forward", failing)
            with pytest.raises(MemoryError):
                engine.step()
            monkeypatch.setattr(type(model), "forward", forward)
        for output in engine.step():
            tokens[output.request_id] += output.new_token_ids
    assert [tuple(tokens[request_id]) for request_id in ids] == [done.token_ids for done in expected]


def test_another_requests_state_is_never_used(engine):
    engine.add_request(PROMPT, greedy(9))
    engine.add_request([9, 9], greedy(9))
    engine.step()
    first, second = engine.scheduler.running
    group = next(group for group in first.tables if group in second.tables and len(first.tables[group].blocks) == 1)
    first.tables[group], second.tables[group] = second.tables[group], first.tables[group]
    with pytest.raises(IntegrityError, match="request-0 continues after 5 tokens, and block .* of request-1 after"):
        engine._runner.run([first], 1)
    first.tables[group], second.tables[group] = second.tables[group], first.tables[group]
    with pytest.raises(IntegrityError, match="request-1 continues after 2 tokens, and block .* holds no valid state"):
        engine._runner.run([second], 1)
    engine.scheduler.restart([first, second])


def test_a_plan_of_another_model_is_refused(model):
    groups = make_ready(tiny_model("granitemoehybrid")).groups
    traits = traits_of("bamba")
    check_plan(model, traits, groups)  # these two store the same
    other = tuple(LayerGroup(index=g.index, kind=g.kind, layers=g.layers[:1], block_size=g.block_size) for g in groups)
    with pytest.raises(
        UnsupportedModelError,
        match=r"layer 2 of bamba stores conv state 0 \(192, 4\) .* has no conv",
    ):
        check_plan(model, traits, other)


def test_a_plan_for_another_engine_is_refused(model):
    from makeready.cache.grouping import group_layers
    from makeready.hybrid.model_specs import read_model

    spec = read_model(model.config.to_dict(), engine="vllm", dtype="float32")
    with pytest.raises(UnsupportedModelError, match=r"stores conv state 0 \(192, 4\) .* the plan has conv state 0 \("):
        check_plan(model, traits_of("bamba"), group_layers(spec.layers, 16, 64))
    assert spec.layers != spec_of(model).layers


@pytest.mark.parametrize("model_type", ["recurrent_gemma", "qwen3_5", "opt"])
def test_families_that_cannot_work_are_refused_with_the_reason(model_type):
    reason = {"recurrent_gemma": "inside the module", "qwen3_5": "it takes images", "opt": "never run against"}
    with pytest.raises(UnsupportedModelError, match=f"model type '{model_type}' .*: .*{reason[model_type]}"):
        traits_of(model_type)


def test_transformers_versions_are_checked():
    check_version("5.17.0")
    check_version("6.0.0.dev0")
    with pytest.raises(UnsupportedModelError, match=r"transformers 5.16.4 is older than 5.17"):
        check_version("5.16.4")


def test_a_scan_that_moved_is_refused_by_name(model):
    with pytest.raises(UnsupportedModelError, match="modeling_bamba has no function 'mamba_selective_scan'"):
        scan_module(model, traits_of("jamba"))


def test_a_model_in_training_mode_is_refused():
    model = tiny_model("llama").train()
    with pytest.raises(ConfigError, match=r"training mode.*call model.eval\(\)"):
        TransformersEngine(model, None, make_ready(model))


def test_a_model_in_another_engine_is_refused(engine, model):
    with pytest.raises(ConfigError, match="belongs to another engine; close that one first"):
        TransformersEngine(model, None, make_ready(model))


def test_a_model_on_another_device_is_refused():
    model = tiny_model("llama")
    ready = make_ready(model)
    with pytest.raises(ConfigError, match="the model is on meta and the cache on cpu"):
        TransformersEngine(model.to("meta"), None, ready)


def test_states_at_block_boundaries_are_refused(model):
    with pytest.raises(ConfigError, match="mamba_cache_mode 'align' keeps states at block boundaries"):
        TransformersEngine(model, None, make_ready(model, mamba_cache_mode="align"))


def test_the_attention_outside_the_engine_says_so(engine, model):
    with pytest.raises(IntegrityError, match="called outside the engine.*close the engine"):
        model(input_ids=torch.tensor([PROMPT]))


def test_arguments_that_change_attention_are_refused_by_name(engine):
    attend = attention.attend
    from transformers import AttentionInterface

    AttentionInterface.register(attention.NAME, lambda *a, **k: attend(*a, **k, position_bias=torch.ones(1)))
    try:
        with pytest.raises(BackendError, match="passes position_bias to attention"):
            engine.generate([PROMPT], greedy(1))
    finally:
        AttentionInterface.register(attention.NAME, attend)


def test_a_new_request_sees_nothing_of_an_old_one(model):
    """Same tokens on a cache that was never used, and on blocks that others used, with and without poison."""
    fresh = TransformersEngine(model, None, make_ready(model))
    expected = fresh.generate([PROMPT], greedy(10))[0].token_ids
    fresh.close()
    for poison in (False, True):
        used = TransformersEngine(model, None, make_ready(model), poison_freed=poison)
        for round_number in range(12):
            used.generate([[3 + round_number] * 70, [4, 5, 6]], greedy(8))
        assert used.generate([PROMPT], greedy(10))[0].token_ids == expected
        used.close()


def test_two_streams_that_take_turns_both_get_everything(engine):
    long, short = SamplingParams(max_new_tokens=9, ignore_eos=True), SamplingParams(max_new_tokens=3, ignore_eos=True)
    one, two = engine.stream(PROMPT, long), engine.stream(PROMPT, short)
    first = [next(one), next(two)]
    assert [len([first[0], *one]), len([first[1], *two])] == [9, 3]
    assert not engine.has_requests()


def test_a_request_that_a_callback_aborts_ends(engine):
    params = SamplingParams(max_new_tokens=9, ignore_eos=True)
    (done,) = engine.generate([PROMPT], params, on_output=lambda output: engine.abort(output.request_id))
    assert (done.finish_reason, len(done.token_ids)) == ("abort", 1)


def test_outputs_before_an_error_in_the_same_step_are_kept(engine, monkeypatch):
    decoding = engine.add_request(PROMPT, SamplingParams(max_new_tokens=2, ignore_eos=True))
    outputs = engine.step()
    engine.add_request(PROMPT)
    run = engine._runner.run

    def broken_prefill(requests, length):
        if length > 1:
            raise RuntimeError("no memory")
        return run(requests, length)

    monkeypatch.setattr(engine._runner, "run", broken_prefill)
    with pytest.raises(RuntimeError, match="no memory"):
        engine.step()
    monkeypatch.undo()
    outputs += engine.step()
    assert [output.finished for output in outputs if output.request_id == decoding] == [False, True]


def test_one_text_is_no_list_of_prompts(engine):
    with pytest.raises(RequestError, match="letter by letter; give a list"):
        engine.generate("Once upon")


def test_a_closed_engine_does_not_answer(model):
    engine = TransformersEngine(model, None, make_ready(model))
    engine.close()
    with pytest.raises(IntegrityError, match="closed cannot go on"):
        engine.generate([PROMPT])


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_new_tokens", 2.5), ("top_k", 1.5), ("temperature", "1"), ("temperature", 1e-310), ("stop_token_ids", 5)],
)
def test_settings_of_the_wrong_type_are_refused_at_the_door(engine, name, value):
    with pytest.raises(RequestError, match=name):
        engine.add_request(PROMPT, SamplingParams(**{name: value}))


def test_token_ids_are_whole_numbers(engine):
    with pytest.raises(RequestError, match=r"1\.7 is no token id"):
        engine.add_request([1.7, 2])
