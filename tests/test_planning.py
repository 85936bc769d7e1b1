"""Whole plans: every preset on every platform, capacity, groups, and what a plan says of itself."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import makeready as mr
from makeready.attention_backends.interface import Capabilities
from makeready.cache.capacity import Holding, PoolShape, plan_capacity
from makeready.cache.grouping import group_layers, pool_bytes_per_block, slots_per_block
from makeready.cache.specs import AttentionSpec, LayerSpec, MambaSpec, StateTensor
from makeready.config import EngineConfig
from makeready.device import DeviceFacts
from makeready.errors import BackendError, CapacityError, ConfigError, MakereadyError
from makeready.hybrid.model_specs import ModelSpec, read_model
from makeready.hybrid.presets import preset_names
from makeready.platforms.cpu import CPU
from makeready.platforms.cuda import CUDA
from makeready.platforms.interface import Platform
from makeready.platforms.planning import Plan, plan_model
from makeready.platforms.xpu import XPU

NANO = "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"
FLEX = Capabilities(name="flex", dtypes=frozenset(), kv_cache_dtypes=frozenset(), kernel_block_multiple=16)
FLASH = Capabilities(name="flash", dtypes=frozenset(), kv_cache_dtypes=frozenset(), kernel_block_multiple=64)
KEYS = {
    "model", "model_type", "platform", "engine", "dtype", "kv_cache_dtype", "tensor_parallel_size", "block_size",
    "kernel_block_sizes", "attention_page_bytes", "attention_bytes_per_token", "state_raw_bytes", "state_page_bytes",
    "mamba_page_size_padded", "mamba_padding_pct", "mamba_block_size", "mamba_cache_mode", "pages_equal",
    "slots_per_block", "pool_bytes_per_block", "groups", "layers", "capacity", "reasons", "refusals", "warnings",
}  # fmt: skip
POOL = PoolShape(block_bytes=64)
PURE_MAMBA2: dict[str, Any] = {
    "model_type": "mamba2", "hidden_size": 64, "num_hidden_layers": 5, "expand": 2, "num_heads": 8, "head_dim": 16,
    "state_size": 16, "n_groups": 2, "conv_kernel": 4, "dtype": "bfloat16",
}  # fmt: skip


def planned(model: Any, platform: Platform = CUDA, backend: Capabilities = FLEX, *, engine: str = "vllm",
            device: DeviceFacts | None = None, **options: Any) -> Plan:  # fmt: skip
    spec = read_model(model, engine=engine)
    config = EngineConfig.from_options(**options)
    return plan_model(spec, platform, {layer.layer: backend for layer in spec.attention_layers}, config, device)


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
@pytest.mark.parametrize("platform", [CPU, CUDA, XPU], ids=lambda platform: platform.name)
def test_every_preset_plans(platform: Platform, engine: str) -> None:
    for name in preset_names():
        backend = FLASH if platform is XPU else FLEX
        plan = planned(name, platform, backend, engine=engine, memory_bytes=1 << 40)
        facts = json.loads(json.dumps(plan.to_dict()))
        assert set(facts) >= KEYS
        assert facts["pages_equal"] is (facts["page_strategy"] == "unified" if plan.model.is_hybrid else None)
        assert facts["block_size"] % backend.kernel_block_multiple == 0
        assert facts["state_page_bytes"] >= facts["state_raw_bytes"]
        in_pages = [x for x in facts["layers"] if facts["page_strategy"] == "unified" or x["backend"] is not None]
        assert max(layer["page_bytes"] for layer in in_pages) <= plan.page_bytes
        grouped = Counter(index for group in facts["groups"] for index in group["layers"])
        assert grouped == Counter(layer.layer for layer in plan.model.layers)
        assert facts["capacity"]["concurrency"]["512"] > 0
        assert plan.explain().count("\n") > 8


def test_a_decision_is_quick() -> None:
    spec = read_model(NANO, engine="vllm")
    backends = {layer.layer: FLASH for layer in spec.attention_layers}
    config = EngineConfig.from_options(memory_bytes=1 << 36)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        plan_model(spec, XPU, backends, config)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.005


def test_a_plan_of_nemotron_3_nano_in_numbers() -> None:
    facts = planned(NANO, XPU, FLASH, memory_bytes=10 << 30, max_model_len=8192).to_dict()
    assert facts["pool_bytes_per_block"] == 6 * 2112 * 1024
    assert [(group["kind"], len(group["layers"])) for group in facts["groups"]] == [  # type: ignore[attr-defined]
        ("mamba2", 6), ("mamba2", 6), ("mamba2", 6), ("mamba2", 5), ("attention", 6),
    ]  # fmt: skip
    blocks = (10 << 30) // (6 * 2112 * 1024)
    assert facts["capacity"] == {
        "memory_bytes": 10 << 30,
        "num_blocks": blocks,
        "max_tokens": 8192,
        "floor_bytes_per_request": 5 * 6 * 2112 * 1024,
        "concurrency": {"512": (blocks - 1) // 5, "4096": (blocks - 1) // 6, "8192": (blocks - 1) // 8},
    }
    assert any("blocks grew from 64 to 2112 tokens" in warning for warning in facts["warnings"])  # type: ignore[attr-defined]


def test_planning_changes_nothing_it_was_given() -> None:
    spec, config = read_model(NANO), EngineConfig.from_options(memory_bytes=1 << 34)
    backends = {layer.layer: FLEX for layer in spec.attention_layers}
    before = (repr(spec), repr(config), dict(backends))
    first, second = (plan_model(spec, CUDA, backends, config) for _ in range(2))
    assert first == second
    assert (repr(spec), repr(config), dict(backends)) == before


def test_models_without_attention_have_pages_of_one_state() -> None:
    plan = planned(PURE_MAMBA2, memory_bytes=1 << 20)
    state = plan.model.state_layers[0].spec
    assert isinstance(state, MambaSpec)
    assert plan.page_bytes == state.state_bytes == plan.decision.state_page_bytes
    assert (plan.block_size, plan.decision.kernel_block_sizes, plan.to_dict()["pages_equal"]) == (16, {}, None)
    assert plan.capacity is not None
    assert plan.capacity.concurrency[512] == plan.capacity.num_blocks - 1
    assert any("the block size counts nothing" in reason for reason in plan.reasons)


def test_layers_may_have_different_backends() -> None:
    spec = read_model("openai/gpt-oss-20b")
    backends = {layer.layer: FLASH if layer.kind == "sliding" else FLEX for layer in spec.attention_layers}
    plan = plan_model(spec, CUDA, backends, EngineConfig())
    assert plan.decision.kernel_block_sizes == {"flash": 64, "flex": 64}
    assert {(layer.kind, layer.backend) for layer in plan.layers} == {("sliding", "flash"), ("attention", "flex")}
    assert [group.kind for group in plan.groups] == ["attention", "sliding"]


def test_a_mask_block_of_the_user_divides_the_block() -> None:
    plan = planned("Qwen/Qwen3-8B", flex_attn_kv_block_size=128)
    assert (plan.block_size, plan.decision.kernel_block_sizes) == (128, {"flex": 128})
    smaller = planned(NANO, flex_attn_kv_block_size=32)
    assert (smaller.block_size, smaller.decision.kernel_block_sizes) == (2112, {"flex": 32})
    assert planned("Qwen/Qwen3-8B", backend=FLASH, flex_attn_kv_block_size=128).block_size == 64


def test_every_attention_layer_needs_a_backend() -> None:
    with pytest.raises(BackendError, match=r"attention layers \[0, 1, .* have no backend"):
        plan_model(read_model("Qwen/Qwen3-8B"), CUDA, {}, EngineConfig())


def test_memory_comes_from_the_setting_then_the_device() -> None:
    device = DeviceFacts(platform="cuda", device_type="cuda", memory_bytes=80 << 30)
    plan = planned("Qwen/Qwen3-8B", device=device, memory_fraction=0.5)
    assert plan.capacity is not None
    assert plan.capacity.memory_bytes == 40 << 30
    assert any("weights, whose size is not known and counts as 0" in reason for reason in plan.reasons)
    assert planned("Qwen/Qwen3-8B", device=device, memory_bytes=1 << 34).capacity.memory_bytes == 1 << 34  # type: ignore[union-attr]
    assert planned("Qwen/Qwen3-8B").capacity is None
    fixed = planned("Qwen/Qwen3-8B", num_blocks=1000).capacity
    assert fixed is not None
    assert (fixed.num_blocks, fixed.max_tokens, fixed.memory_bytes) == (1000, 999 * 16, 1000 * 16 * 4096 * 36)


def test_weights_of_the_checkpoint_are_taken_off(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PURE_MAMBA2), encoding="utf-8")
    header = json.dumps({"a": {"dtype": "BF16", "shape": [500], "data_offsets": [0, 1000]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(1000))
    device = DeviceFacts(platform="cpu", device_type="cpu", memory_bytes=1_000_000)
    plan = planned(tmp_path, CPU, device=device, memory_fraction=1)
    assert plan.capacity is not None
    assert plan.capacity.memory_bytes == 999_000
    with pytest.raises(CapacityError, match="weights alone take"):
        planned(tmp_path, CPU, device=DeviceFacts(platform="cpu", device_type="cpu", memory_bytes=1000))


def test_a_request_that_cannot_fit_is_refused_when_asked_for_and_cut_when_not() -> None:
    memory = 3 << 30
    plan = planned("Qwen/Qwen3-8B", memory_bytes=memory)
    longest = plan.max_model_len
    assert longest == memory // (16 * 4096 * 36) * 16 - 16 < 40960
    assert any(f"is served is {longest}" in warning for warning in plan.warnings)
    assert planned("Qwen/Qwen3-8B", memory_bytes=memory, max_model_len=longest).max_model_len == longest
    with pytest.raises(CapacityError, match=f"max_model_len {longest + 1} needs .* the longest that fits is {longest}"):
        planned("Qwen/Qwen3-8B", memory_bytes=memory, max_model_len=longest + 1)
    with pytest.raises(CapacityError, match="cannot hold one request: 5 layer groups need a block of .* 6 blocks"):
        planned(NANO, memory_bytes=1 << 25)
    with pytest.raises(CapacityError, match="num_blocks 5 cannot hold one request"):
        planned(NANO, num_blocks=5)
    with pytest.raises(ConfigError, match="max_model_len 50000 is more than the 40960 tokens"):
        planned("Qwen/Qwen3-8B", max_model_len=50000)


def attention_layer(index: int, window: int | None = None) -> LayerSpec:
    return LayerSpec(layer=index, spec=AttentionSpec(num_query_heads=2, num_kv_heads=1, head_size=8, head_size_v=8,
                                                     dtype="float32", sliding_window=window))  # fmt: skip


def state_layer(index: int) -> LayerSpec:
    state = StateTensor(name="conv", shape=(4, 8), dtype="float32")
    return LayerSpec(layer=index, spec=MambaSpec(kind="shortconv", states=(state,)))


@given(st.lists(st.sampled_from(("state", "full", "window")), min_size=1, max_size=40))
def test_groups_hold_every_layer_once_and_are_of_one_size(kinds: list[str]) -> None:
    layers = [
        state_layer(i) if kind == "state" else attention_layer(i, 16 if kind == "window" else None)
        for i, kind in enumerate(kinds)
    ]
    groups = group_layers(layers, 16, 4096)
    assert sorted(layer.layer for group in groups for layer in group.layers) == list(range(len(layers)))
    assert [group.index for group in groups] == list(range(len(groups)))
    assert all(len({layer.spec for layer in group.layers}) == 1 for group in groups)
    assert all(group.block_size == (4096 if group.is_state else 16) for group in groups)
    counts = Counter(kinds)
    smallest, largest = min(counts.values()), max(counts.values())
    assert slots_per_block(groups) == (largest if 2 * largest < 3 * smallest else smallest)
    assert pool_bytes_per_block(groups, 10) == 10 * slots_per_block(groups)


def test_no_layers_no_groups() -> None:
    assert group_layers([], 16, 16) == ()
    assert slots_per_block(()) == 0


def test_what_a_request_holds() -> None:
    groups = group_layers([state_layer(0), attention_layer(1), attention_layer(2, 33)], 16, 4096)
    plain = Holding()
    assert [plain.request_blocks(groups, n) for n in (1, 16, 17, 160)] == [3, 3, 5, 21]
    freeing = Holding(frees_out_of_window=True, in_flight=16)
    assert freeing.request_blocks(groups, 160) == 1 + 10 + (3 + 1)
    every = group_layers([state_layer(0), attention_layer(1)], 16, 32)
    assert Holding(mamba_cache_mode="align").request_blocks(every, 160) == 1 + 10
    assert Holding(mamba_cache_mode="all").request_blocks(every, 160) == 5 + 10


@given(st.integers(1, 400), st.integers(2, 200))
def test_the_longest_request_is_the_longest(blocks: int, limit: int) -> None:
    groups = group_layers([state_layer(0), attention_layer(1)], 16, 4096)
    if blocks < 3:
        with pytest.raises(CapacityError, match="num_blocks"):
            plan_capacity(groups, POOL, num_blocks=blocks, lengths=(), max_model_len=limit, holding=Holding())
        return
    found = plan_capacity(groups, POOL, num_blocks=blocks, lengths=(1, limit), max_model_len=limit, holding=Holding())
    fits = [n for n in range(1, limit + 1) if Holding().request_blocks(groups, n) <= blocks - 1]
    assert found.max_tokens == max(fits)
    assert found.concurrency[limit] == (blocks - 1) // Holding().request_blocks(groups, limit)


def test_the_spec_says_what_kind_of_model_it_is() -> None:
    def traits(model: Any) -> tuple[bool, int, int]:
        spec: ModelSpec = read_model(model)
        return spec.is_hybrid, len(spec.attention_layers), len(spec.state_layers)

    assert traits(NANO) == (True, 6, 23)
    assert traits("tiiuae/Falcon-H1-0.5B-Instruct") == (True, 36, 36)
    assert traits("microsoft/Phi-4-mini-flash-reasoning") == (True, 9, 9)
    assert traits(PURE_MAMBA2) == (False, 0, 5)


def test_options_beside_a_config_are_refused_not_dropped():
    config = mr.EngineConfig.from_options(model="Qwen/Qwen3-8B", platform="xpu")
    assert mr.plan(config).platform == "xpu"
    with pytest.raises(ConfigError, match="options kv_cache_dtype came beside an EngineConfig"):
        mr.plan(config, kv_cache_dtype="fp8")


@pytest.mark.parametrize(("option", "value"), [("device_memory_bytes", "80GiB"), ("device_index", "a"), ("seed", -1)])
def test_numbers_that_are_none_are_refused(option, value):
    with pytest.raises(ConfigError, match=option):
        mr.EngineConfig.from_options(**{option: value})


@pytest.mark.parametrize("strategy", ["unified", "subdivided"])
def test_padding_of_a_group_is_what_its_layers_leave_of_a_block(strategy) -> None:
    plan = planned(NANO, page_strategy=strategy)
    facts = plan.to_dict()
    used = {layer["layer"]: layer["page_bytes"] for layer in facts["layers"]}  # type: ignore[attr-defined]
    for group in facts["groups"]:  # type: ignore[attr-defined]
        alone = strategy == "subdivided" and group["kind"] == "mamba2"
        whole = group["page_bytes"] if alone else plan.pool_bytes_per_block
        assert group["padding_bytes"] == whole - sum(used[layer] for layer in group["layers"]) >= 0


@pytest.mark.parametrize("option", ["use_replayssm", "free_out_of_window", "batch_invariant"])
@pytest.mark.parametrize("value", ["no", 1, None])
def test_a_switch_is_on_or_off(option, value):
    with pytest.raises(ConfigError, match=f"{option} .* is none of True, False"):
        mr.plan(NANO, platform="cuda", **{option: value})


@pytest.mark.parametrize(
    ("wrote", "meant"),
    [("kv_cache_dytpe", "kv_cache_dtype"), ("memory", "memory_bytes"), ("tp", "tensor_parallel_size")],
)
def test_a_misspelled_setting_is_told_what_was_meant(wrote, meant):
    with pytest.raises(ConfigError, match=f"setting '{wrote}' is not known, did you mean {meant}") as caught:
        mr.plan(NANO, platform="cuda", **{wrote: 2})
    assert len(caught.value.message) < 250
    assert meant in caught.value.expected  # type: ignore[operator]


def test_a_setting_that_resembles_none_is_told_where_they_are():
    with pytest.raises(ConfigError, match="setting 'xyz' is not known; .*docs/reference/settings.md"):
        mr.plan(NANO, platform="cuda", xyz=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_blocks": 10_000, "memory_bytes": 1 << 30}, "num_blocks 10000 .* memory_bytes is 1.00 GiB: .* fit"),
        ({"num_blocks": 10_000, "device_memory_bytes": 1 << 30}, "num_blocks 10000 .* device_memory_bytes is 1.00 GiB"),
        ({"memory_bytes": 2 << 30, "device_memory_bytes": 1 << 30}, "is more than device_memory_bytes"),
        ({"memory_bytes": 2 << 30, "memory_fraction": 0.5}, "memory_fraction 0.5 shares out .* leave one of them out"),
    ],
)
def test_memory_that_is_said_twice_and_differs_is_refused(options, message):
    with pytest.raises(MakereadyError, match=message):
        planned("Qwen/Qwen3-8B", **options)


def test_blocks_that_fit_into_the_memory_beside_them_are_planned():
    assert planned("Qwen/Qwen3-8B", num_blocks=100, memory_bytes=1 << 30, max_model_len=64).capacity.num_blocks == 100


def test_a_model_that_nothing_serves_gets_each_sentence_once() -> None:
    odd = {
        "model_type": "llama", "hidden_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 3, "head_dim": 64, "intermediate_size": 64, "vocab_size": 64, "dtype": "bfloat16",
    }  # fmt: skip
    with pytest.raises(BackendError) as caught:
        mr.plan(odd, platform="cpu")
    assert caught.value.message.count("no multiple of 3 KV heads") == 1
    assert caught.value.message.count("no kernels for this device") == 1
