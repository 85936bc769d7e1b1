"""State shapes and attention widths that are planned, against what transformers really keeps."""

from __future__ import annotations

import pytest

from makeready.cache.specs import AttentionSpec, MambaSpec
from makeready.errors import ConfigError
from makeready.hybrid.model_specs import ModelSpec, read_model
from tiny_models import ATTENTION_FREE, FAMILIES, HYBRID_FAMILIES, tiny_config, tiny_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

Kept = dict[int, dict[str, tuple[tuple[int, ...], str]]]
"""Per layer and tensor: shape without the batch, dtype."""


def planned(spec: ModelSpec) -> Kept:
    """What the plan says, in the terms of transformers' cache."""
    kept: Kept = {}
    for layer in spec.layers:
        found = kept.setdefault(layer.layer, {})
        if isinstance(layer.spec, MambaSpec):
            found |= {tensor.name: (tensor.shape, tensor.dtype) for tensor in layer.spec.states}
        else:
            assert isinstance(layer.spec, AttentionSpec)
            heads = layer.spec.num_kv_heads
            found["key"] = ((heads, layer.spec.head_size), layer.spec.dtype)
            found["value"] = ((heads, layer.spec.head_size_v), layer.spec.dtype)
    return kept


def really_kept(family: str, dtype: str) -> Kept:
    """What two tokens leave in a stock cache."""
    model = tiny_model(family, dtype=dtype)
    cache = transformers.DynamicCache(config=model.config.get_text_config(decoder=True))
    name = "cache_params" if family in ATTENTION_FREE else "past_key_values"
    with torch.no_grad():
        model(torch.tensor([[5, 9]]), use_cache=True, **{name: cache})
    kept: Kept = {}
    for index, layer in enumerate(cache.layers):
        found = {}
        for kind in ("key", "value"):
            tensor = getattr(layer, f"{kind}s", None)
            if tensor is not None:
                found[kind] = ((tensor.shape[1], tensor.shape[3]), str(tensor.dtype).removeprefix("torch."))
        for kind in ("conv", "recurrent"):
            for tensor in states_of(layer, kind):
                found[kind] = (tuple(tensor.shape[1:]), str(tensor.dtype).removeprefix("torch."))
        if found:
            kept[index] = found
    return kept


def states_of(layer: object, kind: str) -> list[torch.Tensor]:
    """Tensors of a linear-attention cache layer, which is a list or a dict by the version of transformers."""
    states = getattr(layer, f"{kind}_states", None) or ()
    return [t for t in (states.values() if isinstance(states, dict) else states) if t is not None]


@pytest.mark.parametrize("family", FAMILIES)
def test_planned_states_are_what_transformers_keeps(family: str) -> None:
    config = tiny_config(family).to_dict()
    assert planned(read_model(config, engine="transformers", dtype="float32")) == really_kept(family, "float32")


@pytest.mark.parametrize("family", HYBRID_FAMILIES)
def test_dtypes_of_a_half_precision_model(family: str) -> None:
    config = tiny_config(family).to_dict()
    assert planned(read_model(config, engine="transformers", dtype="bfloat16")) == really_kept(family, "bfloat16")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_config_reads_like_the_dict(family: str, tmp_path) -> None:
    config = tiny_config(family)
    config.save_pretrained(tmp_path)
    saved = read_model(tmp_path, engine="transformers", dtype="float32")
    assert saved.layers == read_model(config.to_dict(), engine="transformers", dtype="float32").layers
    assert saved.num_layers == config.get_text_config(decoder=True).num_hidden_layers


def test_kernels_store_recurrent_states_as_asked_and_convolutions_as_the_model_does() -> None:
    config = tiny_config("bamba").to_dict()
    spec = read_model(config, engine="transformers", dtype="float32", mamba_ssm_cache_dtype="bfloat16").layers[0].spec
    assert [state.dtype for state in spec.states] == ["float32", "bfloat16"]
    with pytest.raises(ConfigError, match="mamba_cache_dtype bfloat16 cannot be had: .* float32"):
        read_model(config, engine="transformers", dtype="float32", mamba_cache_dtype="bfloat16")
    zaya = tiny_config("zaya").to_dict()
    with pytest.raises(ConfigError, match="mamba_ssm_cache_dtype float32 cannot be had: .* bfloat16"):
        read_model(zaya, engine="transformers", dtype="bfloat16", mamba_ssm_cache_dtype="float32")
    with pytest.raises(ConfigError, match="num_speculative_tokens 2 needs an engine that speculates"):
        read_model(config, engine="transformers", num_speculative_tokens=2)
