"""Configurations into model specs: families, spellings, defaults, and errors that name file and field."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from makeready.cache.specs import AttentionSpec, MambaSpec
from makeready.errors import ConfigError, ModelConfigError, UnsupportedModelError
from makeready.hybrid.model_specs import ModelSpec, read_model
from makeready.hybrid.presets import preset, preset_names

NEMOTRON: dict[str, Any] = {
    "model_type": "nemotron_h", "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16,
    "mamba_num_heads": 16, "mamba_head_dim": 8, "ssm_state_size": 16, "n_groups": 8, "conv_kernel": 4,
    "hybrid_override_pattern": "M-M*E", "torch_dtype": "bfloat16", "max_position_embeddings": 4096,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "dtype": "float16",
    "max_position_embeddings": 128,
}  # fmt: skip
KIMI: dict[str, Any] = dict(preset("moonshotai/Kimi-Linear-48B-A3B-Instruct").config)


def kinds(spec: ModelSpec) -> list[tuple[int, str]]:
    return [(layer.layer, layer.kind) for layer in spec.layers]


def state(spec: ModelSpec) -> MambaSpec:
    found = spec.state_layers[0].spec
    assert isinstance(found, MambaSpec)
    return found


def attention(spec: ModelSpec) -> AttentionSpec:
    found = spec.attention_layers[0].spec
    assert isinstance(found, AttentionSpec)
    return found


@pytest.mark.parametrize(
    "layers",
    [
        {"hybrid_override_pattern": "M-M*E"},
        {"layers_block_type": ["mamba", "mlp", "mamba", "attention", "moe"]},
        {"layer_types": ["linear_attention", "mlp", "linear_attention", "full_attention", "moe"]},
    ],
)
def test_three_ways_to_list_the_same_layers(layers: dict[str, Any]) -> None:
    config = {key: value for key, value in NEMOTRON.items() if key != "hybrid_override_pattern"} | layers
    spec = read_model(config)
    assert kinds(spec) == [(0, "mamba2"), (2, "mamba2"), (3, "attention")]
    assert spec.num_layers == 5


def test_one_model_from_a_dict_a_file_and_a_directory(tmp_path) -> None:
    config = NEMOTRON | {"time_step_limit": [0.0, {"__float__": "Infinity"}]}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_weights(tmp_path / "model-00001-of-00002.safetensors", a=("BF16", [2, 3]), scales=("U8", [4]))
    write_weights(tmp_path / "model-00002-of-00002.safetensors", b=("F32", [5]))
    from_dict, from_file, from_dir = (read_model(m) for m in (config, tmp_path / "config.json", str(tmp_path)))
    assert from_dict.layers == from_file.layers == from_dir.layers
    assert from_dict.weights_bytes is None
    assert from_dir.weights_bytes == 2 * (6 + 5) + 4
    assert read_model(tmp_path, dtype="float32").weights_bytes == 4 * (6 + 5) + 4


def test_files_that_the_index_does_not_name_do_not_count(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(NEMOTRON), encoding="utf-8")
    write_weights(tmp_path / "model-00001-of-00001.safetensors", a=("BF16", [8]))
    write_weights(tmp_path / "consolidated.safetensors", a=("BF16", [8]))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}), encoding="utf-8")
    assert read_model(tmp_path).weights_bytes == 16
    index.write_text(json.dumps({"weight_map": {"a": "model-00002-of-00001.safetensors"}}), encoding="utf-8")
    with pytest.raises(ModelConfigError, match="names model-00002-of-00001.safetensors, which is not there"):
        read_model(tmp_path)


def test_a_file_that_is_no_safetensors_file_is_named(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(NEMOTRON), encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ModelConfigError, match="model.safetensors cannot be read as a safetensors file: a header of"):
        read_model(tmp_path)


def write_weights(file, **tensors) -> None:
    """A safetensors header with these dtypes and shapes, and no data: planning reads no more."""
    header = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]} for name, (dtype, shape) in tensors.items()
    }
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)


def test_a_nested_text_config_is_read_with_the_outer_dtype() -> None:
    inner = dict(preset("Qwen/Qwen3.5-9B").config)
    del inner["torch_dtype"]
    spec = read_model({"model_type": "qwen3_5", "dtype": "float16", "text_config": inner, "vision_config": {}})
    assert (spec.model_type, spec.dtype) == ("qwen3_5_text", "float16")
    assert Counter(layer.kind for layer in spec.layers) == {"gdn": 24, "attention": 8}
    nested = {"model_type": "qwen3_5", "dtype": "float16", "text_config": {**inner, "torch_dtype": "bfloat16"}}
    assert read_model(nested).dtype == "bfloat16"
    with pytest.raises(ModelConfigError, match="dict: field torch_dtype is 'int8'"):
        read_model({"model_type": "qwen3_5", "torch_dtype": "int8", "text_config": inner})


def test_layers_of_families_that_list_none() -> None:
    base = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 64, "num_hidden_layers": 9}
    mamba = {"mamba_d_state": 4, "mamba_d_conv": 4, "mamba_expand": 2}
    jamba = read_model(base | mamba | {"model_type": "jamba", "attn_layer_period": 4, "attn_layer_offset": 1})
    assert [i for i, kind in kinds(jamba) if kind == "attention"] == [1, 5]
    zamba = read_model(base | mamba | {"model_type": "zamba", "n_mamba_heads": 2, "attn_layer_period": 3,
                                       "attn_layer_offset": 1})  # fmt: skip
    assert [i for i, kind in kinds(zamba) if kind == "attention"] == [2, 4, 7]
    assert len(zamba.state_layers) == 9
    gemma = read_model(base | {"model_type": "gemma3_text", "sliding_window": 8, "sliding_window_pattern": 3})
    assert [i for i, kind in kinds(gemma) if kind == "attention"] == [2, 5, 8]
    gpt = read_model(base | {"model_type": "gpt_oss", "sliding_window": 8})
    assert gpt.sinks
    assert [i for i, kind in kinds(gpt) if kind == "sliding"] == [0, 2, 4, 6, 8]
    qwen = read_model(base | {"model_type": "qwen3", "sliding_window": 8, "use_sliding_window": True,
                              "max_window_layers": 7})  # fmt: skip
    assert [i for i, kind in kinds(qwen) if kind == "sliding"] == [7, 8]
    plamo = read_model(base | {"model_type": "plamo2", "mamba_num_heads": 4, "hidden_size_per_head": 16,
                               "mamba_step": 2, "mamba_d_state": 4, "mamba_d_conv": 4})  # fmt: skip
    assert [i for i, kind in kinds(plamo) if kind == "attention"] == [1, 3, 5, 7]


def test_kimi_counts_its_layers_from_one() -> None:
    spec = read_model(KIMI)
    assert [i for i, kind in kinds(spec) if kind == "mla"] == [3, 7, 11, 15, 19, 23, 26]
    assert attention(spec).bytes_per_token == (512 + 64) * 2
    with pytest.raises(ModelConfigError, match=r"full_attn_layers is \[0, 4\]; expected indices from 1 to 27"):
        read_model(KIMI | {"linear_attn_config": KIMI["linear_attn_config"] | {"full_attn_layers": [0, 4]}})


@pytest.mark.parametrize(
    ("setting", "per_token"),
    [("auto", 2 * 2 * 16 * 2), ("float32", 2 * 2 * 16 * 4), ("fp8", 2 * 2 * 16), ("nvfp4", 2 * 2 * (8 + 1)),
     ("int8_per_token_head", 2 * (32 + 8)), ("fp8_per_token_head", 2 * (32 + 8)),
     ("int4_per_token_head", 2 * (16 + 8))],
)  # fmt: skip
def test_bytes_per_token_of_every_kv_dtype(setting: str, per_token: int) -> None:
    assert attention(read_model(NEMOTRON, kv_cache_dtype=setting)).bytes_per_token == per_token


def test_kv_dtypes_that_cannot_be_stored_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_dtype nvfp4 is for K and V with heads; a latent cache \(MLA\)"):
        read_model(KIMI, kv_cache_dtype="nvfp4")
    with pytest.raises(ConfigError, match="nvfp4 scales 16 values together, which head width 24 is not a multiple of"):
        read_model(NEMOTRON | {"head_dim": 24}, kv_cache_dtype="nvfp4")


def test_engines_store_the_same_state_in_different_shapes() -> None:
    config = dict(preset("Qwen/Qwen3-Next-80B-A3B-Instruct").config) | {"linear_value_head_dim": 64}
    vllm, host = (state(read_model(config, engine=engine)) for engine in ("vllm", "transformers"))
    assert [(t.shape, t.dtype) for t in vllm.states] == [((3, 6144), "bfloat16"), ((32, 64, 128), "bfloat16")]
    assert [(t.shape, t.dtype) for t in host.states] == [((6144, 4), "bfloat16"), ((32, 128, 64), "float32")]


@pytest.mark.parametrize(
    ("settings", "dtypes"),
    [
        ({}, ["bfloat16", "float32"]),
        ({"mamba_cache_dtype": "float32"}, ["float32", "float32"]),
        ({"mamba_ssm_cache_dtype": "bfloat16"}, ["bfloat16", "bfloat16"]),
    ],
)
def test_state_dtypes_for_vllm(settings: dict[str, str], dtypes: list[str]) -> None:
    assert [tensor.dtype for tensor in state(read_model(NEMOTRON, engine="vllm", **settings)).states] == dtypes


def test_kda_states_take_two_dtypes() -> None:
    with pytest.raises(ConfigError, match="mamba_ssm_cache_dtype float16 is not one that kda kernels take"):
        read_model(KIMI, engine="vllm", mamba_ssm_cache_dtype="float16")


def test_draft_tokens_widen_convolutions() -> None:
    spec = read_model(NEMOTRON, engine="vllm", num_speculative_tokens=3)
    assert state(spec).states[0].shape[0] == 3 + 3


def test_ranks_split_heads_and_share_groups() -> None:
    spec = read_model(NEMOTRON, engine="vllm", tensor_parallel_size=4)
    assert [tensor.shape for tensor in state(spec).states] == [(3, (128 + 2 * 8 * 16) // 4), (4, 8, 16)]
    assert (attention(spec).num_query_heads, attention(spec).num_kv_heads) == (2, 1)
    one_group = read_model(NEMOTRON | {"n_groups": 1}, engine="vllm", tensor_parallel_size=4)
    assert state(one_group).states[0].shape == (3, 128 // 4 + 2 * 16)
    latent = attention(read_model(KIMI, tensor_parallel_size=8))
    assert (latent.num_query_heads, latent.num_kv_heads, latent.head_size) == (4, 1, 512)


@pytest.mark.parametrize(
    ("change", "tp", "message"),
    [
        ({"n_groups": 3}, 1, "16 mamba2 heads do not divide over n_groups 3"),
        ({"n_groups": 2}, 4, "mamba2 n_groups 2 cannot be served with tensor_parallel_size 4"),
        ({"num_attention_heads": 6, "num_key_value_heads": 3}, 3,
         "mamba2 inner width 128 cannot be split over tensor_parallel_size 3"),
        ({"num_attention_heads": 6}, 4,
         "attention heads 6 cannot be split over tensor_parallel_size 4; sizes that divide it are 1, 2, 3, 6"),
        ({"num_key_value_heads": 3}, 2, "key-value heads 3 cannot be split over tensor_parallel_size 2"),
    ],
)  # fmt: skip
def test_what_ranks_cannot_split_is_refused(change: dict[str, Any], tp: int, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read_model(NEMOTRON | change, engine="vllm", tensor_parallel_size=tp)


def test_unknown_families_name_the_known_ones() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'nemotron' .*did you mean nemotron_h; known are bamba,"):
        read_model(NEMOTRON | {"model_type": "nemotron"})
    with pytest.raises(UnsupportedModelError, match="'recurrent_gemma' .* its recurrent state lives inside the module"):
        read_model({"model_type": "recurrent_gemma"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv_kernel": None}, "config.json lacks the field conv_kernel or mamba_d_conv"),
        ({"ssm_state_size": "big"}, "field ssm_state_size is 'big'; expected a whole number of at least 1"),
        ({"head_dim": 0}, "field head_dim is 0; expected a whole number"),
        ({"n_groups": True}, "field n_groups is True; expected a whole number"),
        ({"hybrid_override_pattern": "M-X*"}, "field hybrid_override_pattern is 'X'; expected letters out of M"),
        ({"hybrid_override_pattern": None}, "lacks the field layer_types or layers_block_type"),
        ({"layer_types": ["mamba", "magic"]}, "field layer_types is 'magic'; expected one of linear_attention"),
        ({"layer_types": "mamba"}, "field layer_types is 'mamba'; expected a list of words"),
        ({"num_hidden_layers": 7}, "hybrid_override_pattern names 5 layers but num_hidden_layers is 7"),
        ({"torch_dtype": "int4"}, "field torch_dtype is 'int4'; expected one of float32"),
        ({"torch_dtype": None, "dtype": "int4"}, "field dtype is 'int4'"),
        ({"model_type": None}, "lacks the field model_type"),
        ({"text_config": 5}, "field text_config is 5; expected an object"),
    ],
)
def test_broken_fields_are_named_with_their_file(change: dict[str, Any], message: str, tmp_path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(NEMOTRON | change), encoding="utf-8")
    with pytest.raises(ModelConfigError, match=message) as caught:
        read_model(file)
    assert str(file) in caught.value.message


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot be read as JSON"), ("[1]", "holds a list; expected a JSON object"), (None, "has no config.json")],
)
def test_broken_files_are_named(content: str | None, message: str, tmp_path) -> None:
    file = tmp_path / "config.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(ModelConfigError, match=message) as caught:
        read_model(tmp_path)
    assert str(file if content is not None else tmp_path) in caught.value.message


def test_what_a_config_leaves_open_is_said() -> None:
    spec = read_model({"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 1, "expand": 2, "state_size": 4,
                       "conv_kernel": 4})  # fmt: skip
    assert (spec.dtype, spec.max_model_len) == ("bfloat16", 32768)
    assert "names no dtype; bfloat16 is assumed" in spec.notes[0]
    assert "names no longest sequence; 32768 tokens are assumed" in spec.notes[1]


def test_requests_to_backends_carry_what_selection_needs() -> None:
    capped = read_model(LLAMA | {"attn_logit_softcapping": 30.0})
    assert [(r.layer, r.dtype, r.soft_cap, r.sinks) for r in capped.layer_requests()] == [
        (0, "float16", 30.0, False), (1, "float16", 30.0, False),
    ]  # fmt: skip


def test_presets_are_found_by_short_name_and_near_misses_are_named() -> None:
    assert len(preset_names()) == 52
    assert preset("nvidia-nemotron-3-nano-30b-a3b-bf16").id == "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"
    with pytest.raises(ModelConfigError, match=r"'Qwen/Qwen3.5-9' is no directory.* did you mean .*Qwen/Qwen3.5-9B"):
        read_model("Qwen/Qwen3.5-9")
    with pytest.raises(ModelConfigError, match="config.json does not exist"):
        read_model("/nowhere/config.json")
    assembled = {name for name in preset_names() if preset(name).assembled}
    assert {"ibm-ai-platform/Bamba-9B-v2", "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B"} <= assembled
    assert "nvidia/Nemotron-H-56B-Base-8K" not in assembled
    assert "preset ibm-ai-platform/Bamba-9B-v2: layer_types" in read_model("Bamba-9B-v2").notes[0]


def test_an_engine_that_is_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match="engine 'sglang' is not known; choose from vllm, transformers"):
        read_model(NEMOTRON, engine="sglang")
