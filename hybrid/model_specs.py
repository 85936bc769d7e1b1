"""A model's configuration -> ModelSpec: what every layer stores, per rank. No torch, no transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..attention_backends.interface import LayerRequest
from ..cache.specs import (
    QUANTISED_KV,
    AttentionSpec,
    LayerSpec,
    MambaSpec,
    StateTensor,
    resolve_kv_cache_dtype,
)
from ..config import DTYPES
from ..errors import ConfigError, UnsupportedModelError
from .config_fields import ConfigFields, load_config
from .families import FAMILIES, REFUSED, Family
from .layer_patterns import LayerKind, explicit_layers
from .mixers import Rank, uneven
from .presets import preset

ENGINES = ("vllm", "transformers")
ASSUMED_MAX_MODEL_LEN = 32768
"""Longest sequence, in tokens, assumed for models whose configuration names none (pure mamba)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTraits:
    """What an engine on transformers has to know about a family."""

    prefill_matches_decode: bool = True
    """False where prefill and decode of the host library differ by more than rounding."""
    chunked_prefill_keeps_state: bool = True
    """False where the host library starts every prefill chunk from an empty state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """What a model stores, for one engine, dtype and number of ranks. All sizes are per rank."""

    name: str
    model_type: str
    engine: str
    dtype: str
    """Dtype of weights and activations."""
    kv_cache_dtype: str
    """Dtype in which K and V are stored."""
    tensor_parallel_size: int
    num_layers: int
    max_model_len: int
    """Longest sequence that the configuration allows, in tokens."""
    layers: tuple[LayerSpec, ...]
    """What layers store; a layer with attention and a state is in it twice, one with neither is not."""
    soft_cap: float | None = None
    """Soft cap of attention logits."""
    sinks: bool = False
    traits: ModelTraits = ModelTraits()
    weights_bytes: int | None = None
    """Bytes of the whole checkpoint; ``None`` where no checkpoint was seen."""
    notes: tuple[str, ...] = ()
    """What was assumed, in sentences."""

    @property
    def attention_layers(self) -> tuple[LayerSpec, ...]:
        """Layers with K and V."""
        return tuple(layer for layer in self.layers if not layer.is_state)

    @property
    def state_layers(self) -> tuple[LayerSpec, ...]:
        """Layers with a state."""
        return tuple(layer for layer in self.layers if layer.is_state)

    @property
    def is_hybrid(self) -> bool:
        """True if the model has attention and states."""
        return bool(self.attention_layers) and bool(self.state_layers)

    def layer_requests(self) -> tuple[LayerRequest, ...]:
        """What each attention layer asks of a backend."""
        return tuple(
            LayerRequest(layer=layer.layer, spec=layer.spec, dtype=self.dtype, soft_cap=self.soft_cap, sinks=self.sinks)
            for layer in self.layers
            if isinstance(layer.spec, AttentionSpec)
        )


def read_model(
    model: str | Path | Mapping[str, Any],
    *,
    engine: str = "transformers",
    tensor_parallel_size: int = 1,
    kv_cache_dtype: str = "auto",
    mamba_cache_dtype: str = "auto",
    mamba_ssm_cache_dtype: str = "auto",
    num_speculative_tokens: int = 0,
    dtype: str = "auto",
    name: str | None = None,
) -> ModelSpec:
    """Read a preset name, a checkpoint directory, a config.json, or a dict with its content.

    :param engine: whose state shapes and dtypes: ``vllm`` or ``transformers``.
    :param name: what to call a model given as a dict.
    :raises ModelConfigError: if the file or a field is missing or broken.
    :raises UnsupportedModelError: for an unknown family, or one that cannot be split over the ranks.
    :raises ConfigError: for a dtype or engine that cannot be had.
    """
    if engine not in ENGINES:
        raise ConfigError(
            f"engine {engine!r} is not known; choose from {', '.join(ENGINES)}",
            option="engine",
            value=engine,
            expected=list(ENGINES),
        )
    fields, notes = _fields(model, name)
    model_type, family = _family(fields)
    layers = (None if family.fixed_layers else explicit_layers(fields)) or family.default_layers(fields)
    model_dtype = _model_dtype(fields, dtype, notes)
    stored = resolve_kv_cache_dtype(kv_cache_dtype, model_dtype)
    rank = Rank(engine=engine, tp=tensor_parallel_size, speculative=num_speculative_tokens)
    state = None
    if family.mixer is not None:
        state = _state_spec(fields, family, rank, model_dtype, mamba_cache_dtype, mamba_ssm_cache_dtype)
    return ModelSpec(
        name=name or _name(model, fields),
        model_type=model_type,
        engine=engine,
        dtype=model_dtype,
        kv_cache_dtype=stored,
        tensor_parallel_size=tensor_parallel_size,
        num_layers=len(layers),
        max_model_len=_max_model_len(fields, notes),
        layers=tuple(_layer_specs(fields, family, layers, state, stored, tensor_parallel_size)),
        soft_cap=fields.number("attn_logit_softcapping"),
        sinks=family.sinks,
        traits=ModelTraits(
            prefill_matches_decode=family.prefill_matches_decode,
            chunked_prefill_keeps_state=family.chunked_prefill_keeps_state,
        ),
        weights_bytes=fields.weights_bytes,
        notes=tuple(notes),
    )


def _fields(model: str | Path | Mapping[str, Any], name: str | None) -> tuple[ConfigFields, list[str]]:
    """The configuration's fields, and what a preset filled in."""
    if isinstance(model, str) and not model.endswith(".json") and not Path(model).expanduser().exists():
        found = preset(model)
        notes = [f"preset {found.id}: {found.assembled}"] if found.assembled else []
        return load_config(found.config, name=f"preset {found.id}"), notes
    return load_config(model, name=name), []


def _name(model: str | Path | Mapping[str, Any], fields: ConfigFields) -> str:
    if isinstance(model, Mapping):
        return str(model.get("_name_or_path") or fields.values.get("model_type"))
    return str(model)


def _family(fields: ConfigFields) -> tuple[str, Family]:
    """The family of ``model_type``.

    :raises UnsupportedModelError: for one that is unknown or refused, naming the known ones.
    """
    model_type = fields.first("model_type")
    if not isinstance(model_type, str):
        raise fields.missing(("model_type",))
    if model_type in FAMILIES:
        return model_type, FAMILIES[model_type]
    if model_type in REFUSED:
        raise UnsupportedModelError(
            f"model_type {model_type!r} of {fields.source} cannot be served: {REFUSED[model_type]}",
            option="model_type",
            value=model_type,
            expected=sorted(FAMILIES),
        )
    close = get_close_matches(model_type, FAMILIES, n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise UnsupportedModelError(
        f"model_type {model_type!r} of {fields.source} is not known{hint} Known are {', '.join(sorted(FAMILIES))}",
        option="model_type",
        value=model_type,
        expected=sorted(FAMILIES),
    )


def _model_dtype(fields: ConfigFields, dtype: str, notes: list[str]) -> str:
    if dtype != "auto":
        return dtype
    found = fields.first("dtype", "torch_dtype")
    if found is None:
        notes.append(f"{fields.source} names no dtype; bfloat16 is assumed")
        return "bfloat16"
    word = str(found).removeprefix("torch.")
    if word not in DTYPES:
        raise fields.broken("dtype", found, f"one of {', '.join(DTYPES)}")
    return word


def _max_model_len(fields: ConfigFields, notes: list[str]) -> int:
    names = ("max_position_embeddings", "model_max_length")
    if fields.first(*names) is None:
        notes.append(f"{fields.source} names no longest sequence; {ASSUMED_MAX_MODEL_LEN} tokens are assumed")
        return ASSUMED_MAX_MODEL_LEN
    return fields.integer(*names)


def _layer_specs(
    fields: ConfigFields,
    family: Family,
    layers: tuple[LayerKind, ...],
    state: MambaSpec | None,
    stored: str,
    tp: int,
) -> list[LayerSpec]:
    """One entry per thing that a layer stores."""
    has_attention = any(kind not in (LayerKind.STATE, LayerKind.NOTHING) for kind in layers)
    attention = _attention_spec(fields, family, stored, tp, window=None) if has_attention else None
    sliding = (LayerKind.SLIDING, LayerKind.BOTH_SLIDING)
    windowed = None
    if any(kind in sliding for kind in layers):
        windowed = _attention_spec(fields, family, stored, tp, window=fields.integer("sliding_window"))
    found: list[LayerSpec] = []
    for index, kind in enumerate(layers):
        if kind in (LayerKind.STATE, LayerKind.BOTH, LayerKind.BOTH_SLIDING):
            if state is None:
                raise fields.broken("layer_types", "a state layer", "attention layers only, as its family has")
            found.append(LayerSpec(layer=index, spec=state))
        if kind in (LayerKind.ATTENTION, LayerKind.BOTH) and attention is not None:
            found.append(LayerSpec(layer=index, spec=attention))
        if kind in sliding and windowed is not None:
            found.append(LayerSpec(layer=index, spec=windowed))
    return found


def _attention_spec(fields: ConfigFields, family: Family, stored: str, tp: int, window: int | None) -> AttentionSpec:
    heads = fields.integer("num_attention_heads")
    if heads % tp:
        raise uneven("attention heads", heads, tp)
    if family.mla:
        return _mla_spec(fields, stored, heads // tp)
    kv_heads = fields.integer("num_key_value_heads", default=heads)
    if max(kv_heads, tp) % min(kv_heads, tp):
        raise uneven("key-value heads", kv_heads, tp)
    if family.head_dim is not None:
        head_dim = family.head_dim(fields)
    else:
        default = fields.integer("hidden_size") // heads
        head_dim = fields.integer("head_dim", "attention_head_dim", default=default)
    if stored == "nvfp4" and head_dim % 16:
        raise ConfigError(
            f"kv_cache_dtype nvfp4 scales 16 values together, which head width {head_dim} is not a multiple of",
            option="kv_cache_dtype",
            value=stored,
            expected="a head width that is a multiple of 16, or another kv_cache_dtype",
        )
    return AttentionSpec(
        num_query_heads=heads // tp,
        num_kv_heads=max(1, kv_heads // tp),
        head_size=head_dim,
        head_size_v=head_dim,
        dtype=stored,
        sliding_window=window,
    )


def _mla_spec(fields: ConfigFields, stored: str, heads: int) -> AttentionSpec:
    """The latent and the rotary part, whole on every rank."""
    if stored in QUANTISED_KV:
        raise ConfigError(
            f"kv_cache_dtype {stored} is for K and V with heads; a latent cache (MLA) takes plain dtypes and fp8",
            option="kv_cache_dtype",
            value=stored,
            expected=["auto", *DTYPES, "fp8", "fp8_e4m3", "fp8_e5m2"],
        )
    return AttentionSpec(
        num_query_heads=heads,
        num_kv_heads=1,
        head_size=fields.integer("kv_lora_rank"),
        head_size_v=fields.integer("qk_rope_head_dim"),
        dtype=stored,
        mla=True,
    )


def _state_spec(
    fields: ConfigFields,
    family: Family,
    rank: Rank,
    model_dtype: str,
    mamba_cache_dtype: str,
    mamba_ssm_cache_dtype: str,
) -> MambaSpec:
    assert family.mixer is not None
    mixer = family.mixer(fields)
    conv = model_dtype if mamba_cache_dtype == "auto" else mamba_cache_dtype
    if rank.engine == "transformers":
        recurrent = model_dtype if family.native_state_dtype else "float32"
        _require_native("mamba_cache_dtype", mamba_cache_dtype, model_dtype)
        _require_native("mamba_ssm_cache_dtype", mamba_ssm_cache_dtype, recurrent)
        _require_no_speculation(rank)
    else:
        recurrent = _recurrent_dtype(fields, family, mamba_ssm_cache_dtype, conv)
    if recurrent not in family.ssm_dtypes:
        raise ConfigError(
            f"mamba_ssm_cache_dtype {recurrent} is not one that {mixer.kind} kernels take; choose "
            f"{' or '.join(family.ssm_dtypes)}",
            option="mamba_ssm_cache_dtype",
            value=recurrent,
            expected=list(family.ssm_dtypes),
        )
    dtypes = {"conv": conv, "recurrent": recurrent}
    return MambaSpec(
        kind=mixer.kind,
        states=tuple(StateTensor(name=name, shape=shape, dtype=dtypes[name]) for name, shape in mixer.shapes(rank)),
    )


def _recurrent_dtype(fields: ConfigFields, family: Family, setting: str, conv: str) -> str:
    """vLLM's rule: the setting, else the configuration's field, else the family's default."""
    if setting not in ("auto", conv) and family.one_state_dtype:
        raise ConfigError(
            f"mamba_ssm_cache_dtype {setting} has no say over this mixer: its state is kept in mamba_cache_dtype, "
            f"{conv}; set that one",
            option="mamba_ssm_cache_dtype",
            value=setting,
            expected=["auto", conv],
        )
    if setting != "auto":
        return setting
    named = fields.first(family.ssm_dtype_field) if family.ssm_dtype_field else None
    if named is not None:
        word = str(named).removeprefix("torch.")
        if word not in DTYPES:
            raise fields.broken(str(family.ssm_dtype_field), named, f"one of {', '.join(DTYPES)}")
        return word
    return conv if family.ssm_dtype == "conv" else family.ssm_dtype


def _require_native(option: str, setting: str, native: str) -> None:
    """transformers decides in which dtype its layers keep states; another one cannot be had."""
    if setting not in ("auto", native):
        raise ConfigError(
            f"{option} {setting} cannot be had: transformers keeps this state in {native}",
            option=option,
            value=setting,
            expected=["auto", native],
        )


def _require_no_speculation(rank: Rank) -> None:
    if rank.speculative:
        raise ConfigError(
            f"num_speculative_tokens {rank.speculative} needs an engine that speculates; states of transformers "
            "keep no room for draft tokens, so use 0",
            option="num_speculative_tokens",
            value=rank.speculative,
            expected=0,
        )
