"""Configuration fields -> what an attention layer stores on one rank."""

from __future__ import annotations

from ..cache.specs import LATENT_BLOBS, QUANTISED_KV, AttentionSpec
from ..config import DTYPES
from ..errors import ConfigError
from .config_fields import ConfigFields
from .families import Family
from .state_shapes import uneven


def attention_spec(
    fields: ConfigFields, family: Family, stored: str, tp: int, window: int | None, page_alignment: int = 1
) -> AttentionSpec:
    """K and V of an attention layer, for ``tp`` ranks.

    :param stored: the resolved KV dtype.
    :param window: tokens of its sliding window; ``None`` for full attention.
    :param page_alignment: bytes that pages of latents (MLA) are a multiple of.
    :raises UnsupportedModelError: if heads cannot be split over the ranks.
    :raises ConfigError: for a KV dtype that these heads cannot be stored in.
    """
    heads = fields.integer("num_attention_heads")
    if heads % tp:
        raise uneven("attention heads", heads, tp)
    if family.mla:
        return _mla_spec(fields, stored, heads // tp, page_alignment)
    if page_alignment > 1:
        raise ConfigError(
            f"mla_page_alignment {page_alignment} rounds pages of latents (MLA) up; this model stores heads of K and V",
            option="mla_page_alignment",
            value=page_alignment,
            expected=None,
        )
    kv_heads = fields.integer("num_key_value_heads", default=heads)
    if max(kv_heads, tp) % min(kv_heads, tp):
        raise uneven("key-value heads", kv_heads, tp)
    if family.head_dim is not None:
        head_dim = family.head_dim(fields)
    else:
        default = fields.integer("hidden_size") // heads
        head_dim = fields.integer("head_dim", "attention_head_dim", default=default)
    if head_dim < 1:
        raise fields.broken("hidden_size", fields.values.get("hidden_size"), f"at least the {heads} attention heads")
    value_dim = fields.integer("v_head_dim", default=head_dim)
    if stored in LATENT_BLOBS:
        raise ConfigError(
            f"kv_cache_dtype {stored} packs the latent of MLA layers; this model stores heads of K and V",
            option="kv_cache_dtype",
            value=stored,
            expected=["auto", *DTYPES, "fp8", *QUANTISED_KV],
        )
    if stored == "nvfp4":
        _require_nvfp4_widths(head_dim, value_dim)
    return AttentionSpec(
        num_query_heads=heads // tp,
        num_kv_heads=max(1, kv_heads // tp),
        head_size=head_dim,
        head_size_v=value_dim,
        dtype=stored,
        sliding_window=window,
    )


def _require_nvfp4_widths(key: int, value: int) -> None:
    """vLLM packs heads of K and V alike, 16 values under one scale.

    :raises ConfigError: for widths that cannot be packed so.
    """
    if key != value:
        said = f"packs heads of K and V alike, and they are {key} and {value} wide"
    elif key % 16:
        said = f"scales 16 values together, which head width {key} is not a multiple of"
    else:
        return
    raise ConfigError(
        f"kv_cache_dtype nvfp4 {said}",
        option="kv_cache_dtype",
        value="nvfp4",
        expected="a head width that is a multiple of 16, or another kv_cache_dtype",
    )


def _mla_spec(fields: ConfigFields, stored: str, heads: int, page_alignment: int) -> AttentionSpec:
    """The latent and the rotary part, whole on every rank."""
    if stored in QUANTISED_KV:
        raise ConfigError(
            f"kv_cache_dtype {stored} is for K and V with heads; a latent cache (MLA) takes plain dtypes, fp8 and "
            f"{' and '.join(LATENT_BLOBS)}",
            option="kv_cache_dtype",
            value=stored,
            expected=["auto", *DTYPES, "fp8", "fp8_e4m3", "fp8_e5m2", *LATENT_BLOBS],
        )
    return AttentionSpec(
        num_query_heads=heads,
        num_kv_heads=1,
        head_size=fields.integer("kv_lora_rank"),
        head_size_v=fields.integer("qk_rope_head_dim"),
        dtype=stored,
        mla=True,
        page_alignment=page_alignment,
    )
