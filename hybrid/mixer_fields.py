"""Configuration fields -> state mixer. One reader per mixer; families differ in spelling only."""

from __future__ import annotations

from .config_fields import ConfigFields
from .state_shapes import GatedDeltaNet, KimiDelta, Lightning, Mamba1, Mamba2, ShortConv, Zaya

EXPAND = ("expand", "mamba_expand")
KERNEL = ("conv_kernel", "mamba_d_conv")
STATE_SIZE = ("ssm_state_size", "mamba_d_state", "state_size")
HEADS = ("mamba_num_heads", "mamba_n_heads", "n_mamba_heads", "num_heads")
HEAD_DIM = ("mamba_head_dim", "mamba_d_head", "mamba_headdim")
GROUPS = ("n_groups", "mamba_n_groups", "mamba_ngroups")


def expanded(fields: ConfigFields) -> int:
    """The inner width of a mamba layer: ``expand`` times the hidden width."""
    return fields.integer(*EXPAND) * fields.integer("hidden_size")


def mamba1(fields: ConfigFields) -> Mamba1:
    """Jamba's mixer, and with ``n_mamba_heads`` Zamba's."""
    return Mamba1(
        inner=expanded(fields),
        state_size=fields.integer(*STATE_SIZE),
        kernel=fields.integer(*KERNEL),
        heads=fields.integer("n_mamba_heads", default=0),
    )


def pure_mamba1(fields: ConfigFields) -> Mamba1:
    """Mamba and Falcon-Mamba: ``intermediate_size``, where given, is the inner width."""
    inner = fields.integer("intermediate_size") if fields.has("intermediate_size") else expanded(fields)
    return Mamba1(inner=inner, state_size=fields.integer(*STATE_SIZE), kernel=fields.integer(*KERNEL))


def mamba2(fields: ConfigFields) -> Mamba2:
    """All mamba2 families: heads times head width is the inner width; either gives the other."""
    heads = fields.integer(*HEADS)
    if fields.first(*HEAD_DIM) in (None, "auto"):
        inner = fields.integer("mamba_d_ssm") if fields.has("mamba_d_ssm") else expanded(fields)
        if inner % heads:
            raise fields.broken(
                next(name for name in HEADS if fields.has(name)),
                heads,
                f"a divisor of the inner width {inner}",
            )
        head_dim = inner // heads
    else:
        head_dim = fields.integer(*HEAD_DIM)
    return Mamba2(
        inner=heads * head_dim,
        heads=heads,
        head_dim=head_dim,
        state_size=fields.integer(*STATE_SIZE),
        groups=fields.integer(*GROUPS),
        kernel=fields.integer(*KERNEL),
    )


def plamo_mamba2(fields: ConfigFields) -> Mamba2:
    """Plamo 2: only x is convolved, so that its groups never reach the state."""
    heads, head_dim = fields.integer(*HEADS), fields.integer("hidden_size_per_head")
    return Mamba2(
        inner=heads * head_dim,
        heads=heads,
        head_dim=head_dim,
        state_size=fields.integer(*STATE_SIZE),
        groups=0,
        kernel=fields.integer(*KERNEL),
    )


def gated_delta_net(fields: ConfigFields) -> GatedDeltaNet:
    """Qwen3-Next and Qwen3.5."""
    return GatedDeltaNet(
        key_heads=fields.integer("linear_num_key_heads"),
        value_heads=fields.integer("linear_num_value_heads"),
        key_dim=fields.integer("linear_key_head_dim"),
        value_dim=fields.integer("linear_value_head_dim"),
        kernel=fields.integer("linear_conv_kernel_dim"),
    )


def olmo_delta_net(fields: ConfigFields) -> GatedDeltaNet:
    """Olmo-Hybrid: widths that are null follow from the attention heads and the hidden width."""
    key_heads = fields.integer("linear_num_key_heads", "num_attention_heads")
    key_dim = fields.integer("linear_key_head_dim", default=3 * fields.integer("hidden_size") // (4 * key_heads))
    return GatedDeltaNet(
        key_heads=key_heads,
        value_heads=fields.integer("linear_num_value_heads", "num_attention_heads"),
        key_dim=key_dim,
        value_dim=fields.integer("linear_value_head_dim", default=2 * key_dim),
        kernel=fields.integer("linear_conv_kernel_dim"),
    )


def kimi_delta(fields: ConfigFields) -> KimiDelta:
    """Kimi Linear: numbers in ``linear_attn_config``, or flat as transformers saves them."""
    inner = fields.part("linear_attn_config")
    if inner.values:
        return KimiDelta(
            heads=inner.integer("num_heads"),
            head_dim=inner.integer("head_dim"),
            kernel=inner.integer("short_conv_kernel_size"),
        )
    return KimiDelta(
        heads=fields.integer("linear_num_heads"),
        head_dim=fields.integer("linear_head_dim"),
        kernel=fields.integer("linear_conv_kernel_dim"),
    )


def short_conv(fields: ConfigFields) -> ShortConv:
    """LFM2."""
    return ShortConv(channels=fields.integer("conv_dim", "hidden_size"), kernel=fields.integer("conv_L_cache"))


def lightning(fields: ConfigFields) -> Lightning:
    """MiniMax-Text-01."""
    heads = fields.integer("num_attention_heads")
    default = fields.integer("hidden_size") // heads
    return Lightning(heads=heads, head_dim=fields.integer("head_dim", default=default))


def zaya(fields: ConfigFields) -> Zaya:
    """Zaya: convolutions of ``cca_time0`` and ``cca_time1`` one after the other."""
    heads = fields.integer("num_attention_heads")
    return Zaya(
        heads=heads,
        kv_heads=fields.integer("num_key_value_heads", default=heads),
        head_dim=fields.integer("head_dim", default=fields.integer("hidden_size") // heads),
        columns=fields.integer("cca_time0", default=2) + fields.integer("cca_time1", default=2) - 2,
    )
