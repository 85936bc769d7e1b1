"""Model families: which mixer, which layers, which attention. Facts only; readers are in mixer_fields.py.

Where a configuration lists no layers, the family's default rule stands in for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from . import mixer_fields as read
from .config_fields import ConfigFields
from .layer_patterns import LayerKind, all_of, attention_at, every
from .state_shapes import Mixer

_S, _A, _W, _B, _BW, _N = LayerKind
Layers = Callable[[ConfigFields], tuple[LayerKind, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What all models of one ``model_type`` have in common."""

    default_layers: Layers
    """The layers where the configuration lists none."""
    mixer: Callable[[ConfigFields], Mixer] | None = None
    """Reader of the state mixer; ``None`` for attention only."""
    fixed_layers: bool = False
    """True if ``default_layers`` holds whatever the configuration lists."""
    mla: bool = False
    head_dim: Callable[[ConfigFields], int] | None = None
    """Attention head width where it is not ``head_dim`` or hidden / heads."""
    ssm_dtype_field: str | None = None
    """Field of the configuration that names the recurrent state's dtype, for vLLM."""
    ssm_dtype: str = "conv"
    """vLLM's recurrent dtype where that field is missing: a dtype, or ``conv`` for the convolution state's."""
    ssm_dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    """Recurrent dtypes that the mixer's kernels take."""
    one_state_dtype: bool = False
    """True if ``mamba_cache_dtype`` rules the recurrent state too and ``mamba_ssm_cache_dtype`` has no say."""
    native_state_dtype: bool = False
    """True if transformers keeps the recurrent state in the model's dtype instead of float32."""
    replay: bool = False
    """True if vLLM can keep rings of recent inputs beside the state (ReplaySSM)."""
    sinks: bool = False
    note: str = ""
    """What a plan for this family should say of its numbers."""


def jamba_layers(fields: ConfigFields) -> tuple[LayerKind, ...]:
    """Attention once per period."""
    return every(fields, fields.integer("attn_layer_period"), fields.integer("attn_layer_offset", least=0), _A, _S)


def bamba_layers(fields: ConfigFields) -> tuple[LayerKind, ...]:
    """Attention in ``attn_layer_indices``; a list that is missing means no attention at all, so it is asked for."""
    return attention_at(fields, fields.integers("attn_layer_indices"), name="attn_layer_indices")


def every_fourth(fields: ConfigFields) -> tuple[LayerKind, ...]:
    """Full attention in the last layer of every ``full_attention_interval``."""
    period = fields.integer("full_attention_interval", default=4)
    return every(fields, period, period - 1, _A, _S)


def olmo_layers(fields: ConfigFields) -> tuple[LayerKind, ...]:
    """Every fourth layer, and the last where that gives none."""
    layers = every(fields, 4, 3, _A, _S)
    return layers if _A in layers else (*layers[:-1], _A)


def kimi_layers(fields: ConfigFields) -> tuple[LayerKind, ...]:
    """``linear_attn_config.full_attn_layers`` counts from 1."""
    inner = fields.part("linear_attn_config")
    if inner.has("full_attn_layers"):
        return attention_at(fields, inner.integers("full_attn_layers"), name="full_attn_layers", base=1)
    layers = every(fields, 4, 0, _A, _S)
    return (_S, *layers[1:])


def lfm2_layers(fields: ConfigFields) -> tuple[LayerKind, ...]:
    """Attention in ``full_attn_idxs``."""
    return attention_at(fields, fields.integers("full_attn_idxs"), name="full_attn_idxs")


def zamba_layers(fields: ConfigFields) -> tuple[LayerKind, ...]:
    """Three layers at the start, then the shared block once per period."""
    period = fields.integer("attn_layer_period", default=6)
    offset = fields.integer("attn_layer_offset", default=4, least=0)
    rest = fields.integer("num_hidden_layers") - 3
    return (_S, _S, _B, *(_B if i % period == offset else _S for i in range(rest)))


def zamba2_layers(fields: ConfigFields) -> tuple[LayerKind, ...]:
    """Zamba2-2.7B's 54 layers; other depths have to list theirs."""
    if fields.integer("num_hidden_layers") != 54:
        raise fields.missing(("layers_block_type",))
    shared = {6, 12, 18, 24, 30, 36, 42, 47, 51}
    return tuple(_B if i in shared else _S for i in range(54))


def plamo2_layers(fields: ConfigFields) -> tuple[LayerKind, ...]:
    """Attention in the middle of every ``mamba_step`` layers."""
    step, count = fields.integer("mamba_step"), fields.integer("num_hidden_layers")
    if count <= step // 2:
        return (*(_S,) * (count - 1), _A)
    return every(fields, step, step // 2, _A, _S)


def minimax_layers(fields: ConfigFields) -> tuple[LayerKind, ...]:
    """``attn_type_list``: 0 is lightning attention, 1 is softmax attention; by default every eighth is softmax."""
    if not fields.has("attn_type_list"):
        return every(fields, 8, 7, _A, _S)
    types = fields.integers("attn_type_list")
    if len(types) != fields.integer("num_hidden_layers"):
        raise fields.broken("attn_type_list", list(types), f"{fields.integer('num_hidden_layers')} numbers")
    return tuple(_A if kind else _S for kind in types)


def sambay_layers(fields: ConfigFields) -> tuple[LayerKind, ...]:
    """Mamba and sliding windows in turn; past the middle one full attention, whose cache all later layers read."""
    half = fields.integer("num_hidden_layers") // 2
    first = tuple(_W if i % 2 else _S for i in range(half))
    return (*first, _S, _A, *(_N,) * (fields.integer("num_hidden_layers") - half - 2))


def alternating_windows(fields: ConfigFields) -> tuple[LayerKind, ...]:
    """A sliding window in every first layer of two."""
    return every(fields, 2, 1, _A, _W)


def gemma3_layers(fields: ConfigFields) -> tuple[LayerKind, ...]:
    """Full attention in the last layer of every ``sliding_window_pattern``."""
    period = fields.integer("sliding_window_pattern", default=6)
    return every(fields, period, period - 1, _A, _W)


def mistral_layers(fields: ConfigFields) -> tuple[LayerKind, ...]:
    """A window in every layer where the configuration has one."""
    return all_of(_W if fields.has("sliding_window") else _A, fields)


def qwen_layers(fields: ConfigFields) -> tuple[LayerKind, ...]:
    """Windows from ``max_window_layers`` on, where they are switched on."""
    count = fields.integer("num_hidden_layers")
    if not fields.first("use_sliding_window") or not fields.has("sliding_window"):
        return (_A,) * count
    start = fields.integer("max_window_layers", default=28, least=0)
    return tuple(_W if i >= start else _A for i in range(count))


def full(fields: ConfigFields) -> tuple[LayerKind, ...]:
    """Full attention everywhere."""
    return all_of(_A, fields)


def states(fields: ConfigFields) -> tuple[LayerKind, ...]:
    """A state everywhere."""
    return all_of(_S, fields)


def both(fields: ConfigFields) -> tuple[LayerKind, ...]:
    """Attention beside a state in every layer."""
    return all_of(_B, fields)


def listed(fields: ConfigFields) -> tuple[LayerKind, ...]:
    """No default is known."""
    raise fields.missing(("layer_types", "layers_block_type", "hybrid_override_pattern"))


def twice_hidden(fields: ConfigFields) -> int:
    """Zamba's shared block sees the hidden state beside the embedding."""
    return 2 * fields.integer("hidden_size") // fields.integer("num_attention_heads")


def plamo_head_dim(fields: ConfigFields) -> int:
    """Plamo 2 has one head width for everything."""
    return fields.integer("hidden_size_per_head")


def _families() -> dict[str, Family]:
    delta = Family(mixer=read.gated_delta_net, default_layers=every_fourth)
    qwen35 = Family(mixer=read.gated_delta_net, default_layers=every_fourth, ssm_dtype_field="mamba_ssm_dtype")
    dense, qwen, mla = (
        Family(default_layers=full),
        Family(default_layers=qwen_layers),
        Family(default_layers=full, mla=True),
    )
    mistral = Family(default_layers=mistral_layers)
    gemma3 = Family(default_layers=gemma3_layers)
    pure_mamba1 = Family(mixer=read.pure_mamba1, default_layers=states, fixed_layers=True)
    return {
        "nemotron_h": Family(mixer=read.mamba2, default_layers=listed, ssm_dtype_field="mamba_ssm_cache_dtype",
                             ssm_dtype="float32", replay=True),
        "bamba": Family(mixer=read.mamba2, default_layers=bamba_layers),
        "granitemoehybrid": Family(mixer=read.mamba2, default_layers=listed),
        "falcon_h1": Family(mixer=read.mamba2, default_layers=both, fixed_layers=True),
        "mamba": pure_mamba1,
        "falcon_mamba": pure_mamba1,
        "mamba2": Family(mixer=read.mamba2, default_layers=states, fixed_layers=True),
        "zamba": Family(mixer=read.mamba1, default_layers=zamba_layers, head_dim=twice_hidden),
        "zamba2": Family(mixer=read.mamba2, default_layers=zamba2_layers, head_dim=twice_hidden),
        "jamba": Family(mixer=read.mamba1, default_layers=jamba_layers),
        "qwen3_next": delta,
        "qwen3_5": qwen35,
        "qwen3_5_text": qwen35,
        "qwen3_5_moe": qwen35,
        "qwen3_5_moe_text": qwen35,
        "olmo_hybrid": Family(mixer=read.olmo_delta_net, default_layers=olmo_layers),
        "kimi_linear": Family(mixer=read.kimi_delta, default_layers=kimi_layers, mla=True, ssm_dtype="float32",
                              ssm_dtypes=("float32", "bfloat16")),
        "lfm2": Family(mixer=read.short_conv, default_layers=lfm2_layers),
        "lfm2_moe": Family(mixer=read.short_conv, default_layers=lfm2_layers),
        "zaya": Family(mixer=read.zaya, default_layers=both, native_state_dtype=True,
                       note="zaya: state shapes are those of transformers; no other engine was seen to serve it"),
        "plamo2": Family(mixer=read.plamo_mamba2, default_layers=plamo2_layers, head_dim=plamo_head_dim,
                         note="plamo2: attention_window_size is not used, attention is planned over all tokens"),
        "minimax_text_01": Family(mixer=read.lightning, default_layers=minimax_layers, one_state_dtype=True),
        "phi4flash": Family(mixer=read.mamba1, default_layers=sambay_layers,
                            note="phi4flash: layers after the middle read the cache of others and store nothing"),
        "llama": dense, "granite": dense, "olmo2": dense, "phi3": mistral,
        "mistral": mistral, "mixtral": mistral,
        "qwen2": qwen, "qwen2_moe": qwen, "qwen3": qwen, "qwen3_moe": qwen,
        "gemma2": Family(default_layers=alternating_windows),
        "gemma3": gemma3, "gemma3_text": gemma3,
        "gpt_oss": Family(default_layers=alternating_windows, sinks=True),
        "deepseek_v2": mla, "deepseek_v3": mla,
    }  # fmt: skip


FAMILIES: Mapping[str, Family] = MappingProxyType(_families())
"""Every ``model_type`` that can be planned."""

REFUSED: Mapping[str, str] = MappingProxyType({
    "deepseek_v4": "each of its layers stores a window of latents, latents of 4 or 128 tokens each, their index and "
    "what compresses them, in blocks of several lengths that vLLM packs by rules of their own; of those only the "
    "alignment of its pages can be planned (mla_page_alignment)",
    "recurrent_gemma": "its recurrent state lives inside the module and not in the cache, so that no paged cache "
    "can hold it per request",
})  # fmt: skip
"""Families that are known and cannot be served, with the reason."""
