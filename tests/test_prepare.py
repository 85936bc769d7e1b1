"""The startup hook end to end: what it decides is what it allocates, and an engine on it generates stock's tokens."""

from __future__ import annotations

import json

import pytest

import makeready
from makeready.errors import BackendError, CapacityError, ConfigError, ModelConfigError, PluginError
from makeready.plugins.hookspecs import hookimpl
from makeready.plugins.manager import load_plugins
from makeready.startup import BUNDLED_MODEL
from tiny_models import tiny_model

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

PROMPTS = ([5, 9, 77, 30, 31, 4, 66], [12], list(range(3, 43)))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture(params=["nemotron_h", "jamba", "qwen3_next"])
def checkpoint(request, tmp_path):
    """A tiny hybrid checkpoint on disk, without a tokenizer."""
    tiny_model(request.param).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("backend", ["reference", "flex"])
@pytest.mark.parametrize("device", DEVICES)
def test_an_engine_on_prepare_generates_the_tokens_of_stock(checkpoint, device, backend):
    from transformers import AutoModelForCausalLM

    from makeready.engines.transformers.engine import SamplingParams, TransformersEngine

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).to(device).eval()
    expected = [
        model.generate(torch.tensor([prompt], device=device), max_new_tokens=16, do_sample=False, eos_token_id=-1)[
            0, len(prompt) :
        ].tolist()
        for prompt in PROMPTS
    ]
    ready = makeready.prepare(
        checkpoint, platform=device, backend=backend, dtype="float32", max_model_len=64, max_num_batched_tokens=16
    )
    ready.cache.poison()
    engine = TransformersEngine(model, None, ready, poison_freed=True)
    done = engine.generate(PROMPTS, SamplingParams(max_new_tokens=16, ignore_eos=True))
    assert [list(completion.token_ids) for completion in done] == expected
    assert engine.pool.num_free == engine.pool.capacity
    engine.pool.check_integrity()
    engine.close()


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_allocated_is_what_was_planned(device):
    ready = makeready.prepare(platform=device, num_blocks=50, backend="reference")
    planned = makeready.plan(BUNDLED_MODEL, platform=device, num_blocks=50, backend="reference", engine="transformers")
    facts = ready.to_dict()
    assert ready.cache.buffer.nbytes == facts["allocated_bytes"] == 50 * planned.pool_bytes_per_block
    assert ready.cache.buffer.device.type == device
    said = ("reasons", "refusals")
    assert {key: facts[key] for key in planned.to_dict() if key not in said} == {
        key: value for key, value in planned.to_dict().items() if key not in said
    }
    for layer in ready.attention:
        key, value = ready.cache.key_value(layer)
        assert key.shape == value.shape == (50, ready.block_size, 2, 32)
    json.dumps(facts)


def test_memory_that_no_request_can_use_is_not_allocated():
    small = makeready.prepare(platform="cpu", max_num_seqs=1, max_model_len=128, backend="reference")
    large = makeready.prepare(platform="cpu", max_num_seqs=4, max_model_len=128, backend="reference")
    attention = sum(not group.is_state for group in small.groups)
    need = small.plan.strategy.shape.least_blocks
    assert small.cache.layout.num_blocks == need(1, attention)
    assert large.cache.layout.num_blocks == need(4, 4 * attention)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 3}, r"give params=SamplingParams\(max_new_tokens=3\)"),
        ({"temperature": 0.5}, r"give params=SamplingParams\(temperature=0.5\)"),
        ({"prompt": "A class"}, r"give prompts=\['A class'\]"),
    ],
)
def test_what_is_asked_of_a_request_is_no_option_of_launch(options, message):
    with pytest.raises(ConfigError, match=message):
        makeready.launch(**options)


def test_a_layout_that_the_backend_cannot_read_is_refused_by_name():
    with pytest.raises(ConfigError, match="layout 'NDH' is not known"):
        makeready.prepare(layout="NDH")
    assert makeready.prepare(layout="HND", backend="reference").cache.layout.order == "HND"


def test_a_budget_too_small_for_one_request_says_what_is_needed():
    with pytest.raises(CapacityError, match=r"memory.* cannot hold one request.* at least \d+ blocks or .* bytes"):
        makeready.prepare(memory_bytes=1000, backend="reference")


def test_a_preset_can_be_planned_but_not_launched():
    with pytest.raises(ModelConfigError, match="a preset can be planned but not launched"):
        makeready.launch("ibm-granite/granite-4.0-h-1b", backend="reference", memory_bytes=2**28, max_model_len=4096)


def test_an_asked_backend_that_cannot_run_here_is_an_error_with_its_reasons():
    with pytest.raises(BackendError, match="'flash' was asked for.* Intel Extension for PyTorch"):
        makeready.prepare(platform="cpu", backend="flash")


def test_plugins_hear_of_the_startup_and_may_constrain_the_block():
    from makeready.cache.block_size import MultipleOf

    class Watcher:
        @hookimpl
        def makeready_block_size_constraints(self, request):
            return [MultipleOf(96, owner="watcher")]

        @hookimpl
        def makeready_engine_startup(self, ready):
            return f"saw blocks of {ready.block_size}"

    ready = makeready.prepare(backend="reference", plugins=load_plugins(extra=[("watcher", Watcher())]))
    assert ready.block_size % 96 == 0
    assert f"watcher: saw blocks of {ready.block_size}" in ready.explain()


def test_launch_returns_one_completion_per_prompt():
    prompts = ["The import statement", "A function definition"]
    done = makeready.launch(prompts=prompts, backend="reference", dtype="float32")
    assert done[0].text.startswith(" occurs within a block")
    assert len(done) == 2


def test_a_mistyped_checkpoint_costs_no_memory(monkeypatch):
    monkeypatch.setattr("makeready.startup.make_ready", lambda *_: pytest.fail("the cache was allocated"))
    with pytest.raises(ModelConfigError, match="'/no/such/model' is not a directory"):
        makeready.launch("/no/such/model", memory_bytes=2**30)


def test_a_plugin_whose_backends_fail_is_an_error_unless_another_is_named():
    class Broken:
        @hookimpl
        def makeready_attention_backends(self, device):
            raise OSError("libvendor.so is gone")

    plugins = load_plugins(extra=[("vendor", Broken())])
    for backend in ("vendor_attention", None):
        with pytest.raises(PluginError, match="plugin 'vendor' .*libvendor.so is gone.*DISABLE_PLUGINS=vendor"):
            makeready.prepare(backend=backend, plugins=plugins)
    assert "libvendor.so is gone" in makeready.prepare(backend="reference", plugins=plugins).explain()
    assert "libvendor.so is gone" in makeready.plan(BUNDLED_MODEL, platform="cuda", plugins=plugins).explain()


def test_a_plan_for_a_cpu_expects_only_what_most_machines_have():
    assert makeready.plan(BUNDLED_MODEL, platform="cpu").to_dict()["kernel_block_sizes"].keys() == {"flex"}
    assert makeready.plan(BUNDLED_MODEL, platform="cpu", backend="flash").layers[1].backend in (None, "flash")


def test_software_that_is_missing_is_named_with_how_to_get_it(monkeypatch):
    """As in a Python where only planning's needs are installed."""
    here = {"torch": True, "transformers": False, "safetensors": False}
    monkeypatch.setattr("makeready.engines.installed.find_spec", lambda name: here[name] or None)
    with pytest.raises(ConfigError, match=r"needs transformers and safetensors, .* pip install 'makeready\[engine\]'"):
        makeready.launch(platform="cpu", backend="reference")
    here["torch"] = False
    for run in (makeready.prepare, makeready.launch):
        with pytest.raises(ConfigError, match=r"needs torch, .* pip install 'makeready\[engine\]'"):
            run(platform="cpu", backend="reference")
