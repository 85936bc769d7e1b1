"""How packed engines decide, refuse, and end early: stop tokens, aborts and errors while steps are in flight."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache

import pytest
import torch

from engine_setup import make_ready
from makeready.engines.transformers.engine import SamplingParams, TransformersEngine
from makeready.engines.transformers.execution import decide
from makeready.engines.transformers.families import TRAITS
from makeready.engines.transformers.packed.choosing import likeliest
from makeready.engines.transformers.packed.patching import exchange_for
from makeready.errors import ConfigError, IntegrityError, UnsupportedModelError
from packed_setup import LENGTHS, NEW, prompts, stock
from tiny_models import tiny_model

GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)
SEEDED = SamplingParams(max_new_tokens=12, temperature=0.9, top_k=40, top_p=0.95, seed=7, ignore_eos=True)


@pytest.fixture(scope="module")
def model():
    return tiny_model("bamba")


@pytest.fixture(params=[False, True], ids=["in step", "ahead"])
def engine(request, model):
    ready = make_ready(model, max_num_batched_tokens=16, packed_steps=True, async_scheduling=request.param)
    engine = TransformersEngine(model, None, ready, poison_freed=True)
    yield engine
    engine.pool.check_integrity()
    engine.close()
    assert engine.pool.num_free == engine.pool.capacity


def reference(model, asked, params=GREEDY):
    """What the engine with the model's own mixers makes of ``asked``; on a copy, since ``model`` may be taken."""
    model = _copy_of(type(model))
    engine = TransformersEngine(model, None, make_ready(model))
    try:
        return [done.token_ids for done in engine.generate(asked, params)]
    finally:
        engine.close()


@cache
def _copy_of(kind):
    copied = tiny_model("bamba")
    assert type(copied) is kind
    return copied


def collected(engine, steps=200):
    tokens: dict[str, list[int]] = {}
    for _ in range(steps):
        if not engine.has_requests():
            break
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
    return tokens


def test_a_stop_token_ends_a_request_where_it_would_in_step(engine, model):
    tokens = engine.generate([prompts()[0]], GREEDY)[0].token_ids
    stop = SamplingParams(max_new_tokens=12, stop_token_ids=(tokens[4],), ignore_eos=True)
    ids = [engine.add_request(prompts()[0], stop), engine.add_request(prompts()[2], GREEDY)]
    later = None
    for _ in range(40):
        for output in engine.step():
            if output.request_id == ids[0] and output.finished and later is None:
                later = engine.add_request(prompts()[1], GREEDY)  # takes the blocks that were given back
        if not engine.has_requests():
            break
    assert not collected(engine)
    assert later is not None
    again = engine.generate([prompts()[0]], stop)[0]
    assert again.finish_reason == "stop"
    assert again.token_ids == tokens[: tokens.index(tokens[4]) + 1]


def test_others_go_on_when_one_stops_or_is_aborted(engine, model):
    asked = [prompts()[index] for index in (0, 2, 1, 4)]
    expected = reference(model, asked)
    first = expected[0]
    ids = [
        engine.add_request(asked[0], SamplingParams(max_new_tokens=12, stop_token_ids=(first[3],), ignore_eos=True)),
        *(engine.add_request(prompt, GREEDY) for prompt in asked[1:]),
    ]
    tokens: dict[str, list[int]] = {}
    for step in range(60):
        if step == 6:
            engine.abort(ids[2])
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
        if not engine.has_requests():
            break
    assert tuple(tokens[ids[0]]) == first[: first.index(first[3]) + 1]
    assert tuple(tokens[ids[1]]) == expected[1]
    assert tuple(tokens[ids[2]]) == expected[2][: len(tokens[ids[2]])]
    assert tuple(tokens[ids[3]]) == expected[3]


def test_a_seed_draws_the_same_tokens_packed_or_not(engine, model):
    asked = [prompts()[0], prompts()[4]]
    assert [done.token_ids for done in engine.generate(asked, SEEDED)] == reference(model, asked, SEEDED)
    mixed = engine.generate([*asked, prompts()[2]], [SEEDED, SEEDED, GREEDY])
    assert mixed[1].token_ids == reference(model, asked, SEEDED)[1]
    assert mixed[2].token_ids == reference(model, [prompts()[2]])[0]


def test_if_the_model_raises_the_steps_are_done_again(engine, model, monkeypatch):
    asked = [prompts()[0], prompts()[1]]
    expected = reference(model, asked)
    ids = [engine.add_request(prompt, GREEDY) for prompt in asked]
    tokens: dict[str, list[int]] = {request_id: [] for request_id in ids}
    forward = type(model).forward

    def failing(*args, **kwargs):
        forward(*args, **kwargs)
        raise MemoryError("out of memory")

    for step in range(60):
        if step == 4:
            monkeypatch.setattr(type(model), "forward", failing)
            with pytest.raises(MemoryError):
                engine.step()
            monkeypatch.setattr(type(model), "forward", forward)
        for output in engine.step():
            tokens[output.request_id].extend(output.new_token_ids)
        if not engine.has_requests():
            break
    assert [tuple(tokens[request_id]) for request_id in ids] == expected


def test_if_reading_tokens_raises_the_steps_are_done_again(engine, model, monkeypatch):
    from makeready.engines.transformers.packed.flight import Flight

    expected = reference(model, [prompts()[0]])[0]
    request_id = engine.add_request(prompts()[0], GREEDY)
    found: list[int] = []
    read = Flight.read
    for step in range(60):
        if step == 3:
            monkeypatch.setattr(Flight, "read", lambda self: (_ for _ in ()).throw(RuntimeError("device lost")))
            with pytest.raises(RuntimeError, match="device lost"):
                engine.step()
            monkeypatch.setattr(Flight, "read", read)
        found += [t for output in engine.step() if output.request_id == request_id for t in output.new_token_ids]
        if not engine.has_requests():
            break
    assert tuple(found) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"async_scheduling": True}, r"--async-scheduling .* needs packed steps, .*; add --packed-steps"),
        ({"compile_layers": True, "packed_steps": False}, "--compile-layers .*, and --no-packed-steps"),
        ({"cuda_graphs": True, "packed_steps": True}, "needs a CUDA device, and the model is on cpu"),
        ({"cuda_graphs": True}, "needs a CUDA device, and the model is on cpu"),
        ({"cuda_graphs": True, "packed_steps": False}, "needs a CUDA device, and the model is on cpu"),
        ({"mixer_backend": "reference", "packed_steps": False}, "--no-packed-steps .* turns those off"),
    ],
)
def test_settings_that_clash_are_refused(model, options, message):
    with pytest.raises(ConfigError, match=message):
        TransformersEngine(model, None, make_ready(model, **options))
    assert "forward" not in model.model.layers[0].__dict__


def test_a_model_has_one_engine_at_a_time(engine, model):
    with pytest.raises(ConfigError, match="belongs to another engine"):
        TransformersEngine(model, None, make_ready(model))


def test_every_decision_has_its_reason(model):
    chosen = decide(model, make_ready(model), TRAITS["bamba"])
    assert chosen.reasons == ("packed_steps: off, since the reference mixers are made to be right, not fast.",)
    chosen = decide(model, make_ready(model, packed_steps=True), TRAITS["bamba"])
    assert [reason.partition(":")[0] for reason in chosen.reasons] == [
        "packed_steps", "compile_layers", "cuda_graphs", "async_scheduling",
    ]  # fmt: skip
    ready = make_ready(model, packed_steps=True, batch_invariant=True)
    said = next(reason for reason in decide(model, ready, TRAITS["bamba"]).reasons if "batch_invariant" in reason)
    assert "matrix products may round by the tokens of a step" in said


def test_a_method_that_moved_is_refused_by_name(monkeypatch):
    """An explicit setting raises; else the model runs as it does without packed steps."""
    zaya = tiny_model("zaya")
    projection = sys.modules[type(zaya).__module__].ZayaCCAProjection
    monkeypatch.setattr(projection, "forward", lambda self, hidden_states, strange: None)
    with pytest.raises(UnsupportedModelError, match="gives 'ZayaCCAProjection.forward' arguments strange"):
        exchange_for(zaya, TRAITS["zaya"])
    monkeypatch.delattr(sys.modules[type(zaya).__module__], "ZayaCCAProjection")
    with pytest.raises(UnsupportedModelError, match=r"has no function 'ZayaCCAProjection\.forward'"):
        exchange_for(zaya, TRAITS["zaya"])


def test_a_function_that_moved_is_refused_by_name(model, monkeypatch):
    module = sys.modules[type(model).__module__]
    monkeypatch.delattr(module, "mamba2_chunk_scan")
    with pytest.raises(UnsupportedModelError, match="has no function 'mamba2_chunk_scan'"):
        exchange_for(model, TRAITS["bamba"])
    monkeypatch.setattr(module, "mamba2_chunk_scan", lambda hidden_states, strange: None, raising=False)
    with pytest.raises(UnsupportedModelError, match="gives 'mamba2_chunk_scan' arguments strange"):
        exchange_for(model, TRAITS["bamba"])


def test_a_forward_that_goes_past_the_kernels_is_noticed(model, monkeypatch):
    monkeypatch.setattr(
        "makeready.engines.transformers.engine.traits_of",
        lambda _: replace(TRAITS["bamba"], kernels=("causal_conv1d_fn",)),
    )
    engine = TransformersEngine(model, None, make_ready(model, packed_steps=True))
    try:
        engine.add_request(prompts()[0], GREEDY)
        with pytest.raises(IntegrityError, match="did not pass through the engine's recurrent kernel"):
            engine.step()
    finally:
        engine.close()


@pytest.mark.parametrize("family", ["jamba", "mamba2", "gpt_oss", "qwen3_next", "kimi_linear", "zaya"])
def test_a_closed_engine_leaves_the_model_as_it_was(family):
    model, tokens, _ = stock(family)
    before = model.config._attn_implementation
    engine = TransformersEngine(model, None, make_ready(model, packed_steps=True))
    with pytest.raises(IntegrityError, match="called outside the engine"):
        model(input_ids=torch.tensor([prompts()[0]]))
    engine.generate([prompts()[1]], GREEDY)
    engine.close()
    assert model.config._attn_implementation == before
    assert all("forward" not in layer.__dict__ for layer in model.base_model.layers)
    again = model.generate(torch.tensor([prompts()[0]]), max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    assert again[0, LENGTHS[0] :].tolist() == tokens[0]


def test_compiled_layers_give_the_same_tokens(model, monkeypatch):
    """Through Dynamo, without a compiler behind it: one piece of code for all layers of a kind."""
    from makeready.engines.transformers.packed import opening
    from makeready.engines.transformers.packed.compiling import CompiledLayers

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(opening, "CompiledLayers", lambda **_: CompiledLayers("eager"))
    engine = TransformersEngine(model, None, make_ready(model, packed_steps=True, compile_layers=True))
    try:
        asked = [prompts()[0], prompts()[4]]
        assert [done.token_ids for done in engine.generate(asked, GREEDY)] == reference(model, asked)
    finally:
        engine.close()
    kinds_of_layers, kinds_of_steps = 2, 2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= kinds_of_layers * kinds_of_steps


@pytest.mark.parametrize("vocabulary", [128, 100, 7])
def test_the_likeliest_token_is_the_first_of_the_largest(vocabulary):
    logits = torch.randn(5, vocabulary)
    assert likeliest(logits).tolist() == logits.argmax(-1).tolist()


def test_prefill_is_not_captured_where_results_must_not_depend_on_the_batch(model):
    """Which steps are small enough for a graph depends on who else prefills."""
    from makeready.engines.transformers.execution import _ragged_obstacle

    assert "batch" in _ragged_obstacle(make_ready(model, batch_invariant=True), None)


def test_compilers_are_asked_for_what_they_know(monkeypatch):
    import torch._inductor

    from makeready.engines.transformers.packed import opening

    monkeypatch.setattr(torch._inductor, "list_options", lambda: ["combo_kernels"])
    assert opening._known(opening.ONE_TOKEN) == {"combo_kernels": True}
    assert opening._known(opening.SEVERAL) == {}


def test_the_installed_torch_knows_what_compiled_layers_ask_for():
    from torch._inductor import list_options

    from makeready.engines.transformers.packed import compiling, opening

    known, version = {*list_options()}, tuple(map(int, torch.__version__.split(".")[:2]))
    assert {*compiling.BESIDE} <= known
    assert version < (2, 11) or {*opening.SEVERAL, *opening.ONE_TOKEN} <= known
