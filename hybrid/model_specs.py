"""A model's configuration -> ModelSpec: what every layer stores, per rank. No torch, no transformers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..attention_backends.interface import LayerRequest
from ..cache.specs import (
    AttentionSpec,
    LayerSpec,
    MambaSpec,
    resolve_kv_cache_dtype,
)
from ..config import DTYPES
from ..errors import ConfigError, UnsupportedModelError, did_you_mean
from .attention_fields import attention_spec
from .config_fields import ConfigFields, load_config
from .families import FAMILIES, REFUSED, Family
from .layer_patterns import LayerKind, explicit_layers
from .presets import preset
from .replay_rings import Replay, without_states
from .state_fields import state_spec
from .state_shapes import Rank
from .weight_files import weights_bytes

ENGINES = ("vllm", "transformers")
FULL = (LayerKind.ATTENTION, LayerKind.BOTH)
SLIDING = (LayerKind.SLIDING, LayerKind.BOTH_SLIDING)
WITH_STATE = (LayerKind.STATE, LayerKind.BOTH, LayerKind.BOTH_SLIDING)
AttentionSpecs = tuple[AttentionSpec | None, AttentionSpec | None]
"""Full attention and sliding windows."""
ASSUMED_MAX_MODEL_LEN = 32768
"""Longest sequence, in tokens, assumed for models whose configuration names none (pure mamba)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """What a model stores, for one engine, dtype and number of ranks. All sizes are per rank."""

    name: str
    model_type: str
    engine: str
    dtype: str
    """Dtype of weights and activations."""
    kv_cache_dtype: str
    """Dtype in which K and V are stored, but for layers that keep the model's; each layer's spec says its own."""
    tensor_parallel_size: int
    num_layers: int
    max_model_len: int
    """Longest sequence that the configuration allows, in tokens."""
    layers: tuple[LayerSpec, ...]
    """What layers store; a layer with attention and a state is in it twice, one with neither is not."""
    soft_cap: float | None = None
    """Soft cap of attention logits."""
    sinks: bool = False
    weights_bytes: int | None = None
    """Bytes of all weights once they are loaded as ``dtype``; ``None`` where no checkpoint was seen."""
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

    def layer_requests(self, *, batch_invariant: bool = False) -> tuple[LayerRequest, ...]:
        """What each attention layer asks of a backend."""
        return tuple(
            LayerRequest(
                layer=layer.layer,
                spec=layer.spec,
                dtype=self.dtype,
                soft_cap=self.soft_cap,
                sinks=self.sinks,
                batch_invariant=batch_invariant,
            )
            for layer in self.layers
            if isinstance(layer.spec, AttentionSpec)
        )


def read_model(
    model: str | Path | Mapping[str, Any],
    *,
    engine: str = "transformers",
    tensor_parallel_size: int = 1,
    kv_cache_dtype: str = "auto",
    kv_cache_dtype_skip_layers: Collection[int] = (),
    mamba_cache_dtype: str = "auto",
    mamba_ssm_cache_dtype: str = "auto",
    num_speculative_tokens: int = 0,
    replay: Replay | None = None,
    mla_page_alignment: int | None = None,
    dtype: str = "auto",
    name: str | None = None,
) -> ModelSpec:
    """Read a preset name, a checkpoint directory, a config.json, or a dict with its content.

    :param engine: whose state shapes and dtypes: ``vllm`` or ``transformers``.
    :param kv_cache_dtype_skip_layers: attention layers whose K and V stay in the model's dtype.
    :param mla_page_alignment: bytes that pages of latents are a multiple of; ``None`` for no rounding.
    :param replay: rings of recent inputs beside mamba2 states (vLLM's ReplaySSM); ``None`` for none.
    :param name: what to call a model given as a dict.
    :raises ModelConfigError: if the file or a field is missing or broken.
    :raises UnsupportedModelError: for an unknown family, or one that cannot be split over the ranks.
    :raises ConfigError: for a dtype or engine that cannot be had, or a skipped layer that has no attention.
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
    notes += [family.note] if family.note else []
    layers = (None if family.fixed_layers else explicit_layers(fields)) or family.default_layers(fields)
    model_dtype = _model_dtype(fields, dtype, notes)
    stored = resolve_kv_cache_dtype(kv_cache_dtype, model_dtype)
    rank = Rank(engine=engine, tp=tensor_parallel_size, speculative=num_speculative_tokens)
    skipped = _skipped(kv_cache_dtype_skip_layers, layers, fields.source)
    if skipped and stored == model_dtype:
        notes.append(f"kv_cache_dtype_skip_layers changes nothing: all layers store K and V in {stored}")
    align = mla_page_alignment or 1
    attention = _attention_specs(fields, family, layers, stored, tensor_parallel_size, align)
    unquantised = attention
    if skipped:
        unquantised = _attention_specs(fields, family, layers, model_dtype, tensor_parallel_size, align)
    state = None
    if family.mixer is not None:
        state = state_spec(fields, family, rank, model_dtype, mamba_cache_dtype, mamba_ssm_cache_dtype, replay)
    elif replay is not None:
        raise without_states(model_type)
    return ModelSpec(
        name=name or _name(model, fields),
        model_type=model_type,
        engine=engine,
        dtype=model_dtype,
        kv_cache_dtype=stored,
        tensor_parallel_size=tensor_parallel_size,
        num_layers=len(layers),
        max_model_len=_max_model_len(fields, notes),
        layers=tuple(_layer_specs(fields, layers, lambda index: unquantised if index in skipped else attention, state)),
        soft_cap=fields.number("attn_logit_softcapping"),
        sinks=family.sinks,
        weights_bytes=weights_bytes(fields.folder, model_dtype) if fields.folder is not None else None,
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
    if model_type is None:
        raise fields.missing(("model_type",))
    if not isinstance(model_type, str):
        raise fields.broken("model_type", model_type, "a family's name, such as llama")
    if model_type in FAMILIES:
        return model_type, FAMILIES[model_type]
    if model_type in REFUSED:
        raise UnsupportedModelError(
            f"model_type {model_type!r} of {fields.source} cannot be served: {REFUSED[model_type]}",
            option="model_type",
            value=model_type,
            expected=sorted(FAMILIES),
        )
    hint = did_you_mean(model_type, FAMILIES)
    raise UnsupportedModelError(
        f"model_type {model_type!r} of {fields.source} is not known{hint}; known are {', '.join(sorted(FAMILIES))}",
        option="model_type",
        value=model_type,
        expected=sorted(FAMILIES),
    )


def _model_dtype(fields: ConfigFields, dtype: str, notes: list[str]) -> str:
    if dtype != "auto":
        return dtype
    name = fields.written("dtype", "torch_dtype")
    if name is None:
        notes.append(f"{fields.source} names no dtype; bfloat16 is assumed")
        return "bfloat16"
    word = str(fields.values[name]).removeprefix("torch.")
    if word not in DTYPES:
        raise fields.broken(name, fields.values[name], f"one of {', '.join(DTYPES)}")
    return word


def _max_model_len(fields: ConfigFields, notes: list[str]) -> int:
    names = ("max_position_embeddings", "model_max_length")
    if fields.first(*names) is None:
        notes.append(f"{fields.source} names no longest sequence; {ASSUMED_MAX_MODEL_LEN} tokens are assumed")
        return ASSUMED_MAX_MODEL_LEN
    return fields.integer(*names)


def _skipped(asked: Collection[int], layers: tuple[LayerKind, ...], source: str) -> frozenset[int]:
    """The layers that keep the model's dtype.

    :raises ConfigError: for one that is no attention layer, naming those that are.
    """
    having = [index for index, kind in enumerate(layers) if kind in FULL or kind in SLIDING]
    wrong = sorted(set(asked) - set(having))
    if wrong:
        named = f"attention layers are {', '.join(map(str, having))}" if having else "it has no attention layers"
        raise ConfigError(
            f"kv_cache_dtype_skip_layers names {', '.join(map(str, wrong))}, which {source} has no attention in; "
            f"{named}",
            option="kv_cache_dtype_skip_layers",
            value=wrong,
            expected=having,
        )
    return frozenset(asked)


def _attention_specs(
    fields: ConfigFields, family: Family, layers: tuple[LayerKind, ...], stored: str, tp: int, align: int
) -> AttentionSpecs:
    """Full attention and sliding windows; ``None`` for what no layer has."""
    full = windowed = None
    if any(kind in FULL for kind in layers):
        full = attention_spec(fields, family, stored, tp, None, align)
    if any(kind in SLIDING for kind in layers):
        windowed = attention_spec(fields, family, stored, tp, fields.integer("sliding_window"), align)
    return full, windowed


def _layer_specs(
    fields: ConfigFields,
    layers: tuple[LayerKind, ...],
    attention: Callable[[int], AttentionSpecs],
    state: MambaSpec | None,
) -> list[LayerSpec]:
    """One entry per thing that a layer stores."""
    found: list[LayerSpec] = []
    for index, kind in enumerate(layers):
        full, windowed = attention(index)
        if kind in WITH_STATE:
            if state is None:
                raise fields.broken("layer_types", "a state layer", "attention layers only, as its family has")
            found.append(LayerSpec(layer=index, spec=state))
        if kind in FULL and full is not None:
            found.append(LayerSpec(layer=index, spec=full))
        if kind in SLIDING and windowed is not None:
            found.append(LayerSpec(layer=index, spec=windowed))
    return found
