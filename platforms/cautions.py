"""What a plan warns of: memory that costs more than one would expect, and what it cannot know without the device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields

from ..cache.capacity import Holding
from ..cache.specs import MambaSpec
from ..config import AttentionConfig, CacheConfig, EngineConfig
from ..device import format_bytes
from ..hybrid.model_specs import ModelSpec
from .decision import BlockSizeDecision
from .interface import Platform
from .stages import StagePlan

NOTABLE_PADDING_PCT = 10.0
"""Padding of a state, in percent of its bytes, from which on a warning says so."""


def dear_blocks(decision: BlockSizeDecision, stage: StagePlan, holding: Holding) -> list[str]:
    """What costs memory more than one would expect, with the numbers."""
    found = []
    raw = decision.state_raw_bytes
    if raw and 100 * (decision.state_page_bytes - raw) > NOTABLE_PADDING_PCT * raw:
        pct = 100 * (decision.state_page_bytes - raw) / raw
        found.append(f"states of {raw} bytes take pages of {decision.state_page_bytes} bytes: padding of {pct:.1f} %.")
    if decision.block_size > 8 * decision.phase1_block_size:
        count, per_block = holding.request_blocks(stage.groups, 1), stage.shape.block_bytes
        drafts = count - len(stage.groups)
        held = f"{len(stage.groups)} groups" if not drafts else f"({len(stage.groups)} groups + {drafts} draft states)"
        found.append(
            f"blocks grew from {decision.phase1_block_size} to {decision.block_size} tokens to hold a state, so that "
            f"the shortest request takes {format_bytes(count * per_block)}: {held} x {format_bytes(per_block)}."
        )
    return found


def idle_stages(stages: Sequence[StagePlan]) -> list[str]:
    """Pipeline stages whose layers store nothing."""
    if all(not stage.groups for stage in stages):
        return []
    return [
        f"{stage.name} stores nothing: its layers read what another stage stores, or keep nothing."
        for stage in stages
        if not stage.groups
    ]


def idle_settings(config: EngineConfig, backends: Iterable[str]) -> list[str]:
    """Settings that the user changed and that count nothing without another one, or without their backend.

    :param backends: names of those that serve the attention layers.
    """
    cache, usual = config.cache, CacheConfig()
    needs = {
        "replayssm_buffer_len": ("use_replayssm", cache.use_replayssm),
        "mamba_backend": ("use_replayssm", cache.use_replayssm),
        "extra_retained_tokens": ("free_out_of_window", cache.free_out_of_window),
    }
    found = [
        f"{option} {getattr(cache, option)} changes nothing without {other}."
        for option, (other, given) in needs.items()
        if not given and getattr(cache, option) != getattr(usual, option)
    ]
    if "flex" not in backends:
        tiles = [setting.name for setting in fields(AttentionConfig) if setting.name.startswith("flex_attn_")]
        found += [
            f"{option} {getattr(config.attention, option)} changes nothing: flex serves no layer."
            for option in tiles
            if getattr(config.attention, option) is not None
        ]
    return found


def reset_states(model: ModelSpec, platform: Platform, config: EngineConfig) -> list[str]:
    """What vLLM changes on some CPUs, which a plan without the device cannot know."""
    if model.engine != "vllm" or platform.device_type != "cpu":
        return []
    kept = config.cache.mamba_ssm_cache_dtype != "auto"
    dtypes = {
        tensor.dtype
        for spec in {layer.spec for layer in model.layers if isinstance(layer.spec, MambaSpec)}
        for tensor in spec.states
        if tensor.name == "recurrent" and not (spec.kind == "gdn" and kept)
    }
    return [
        f"recurrent states are planned in {dtype}; on a CPU with AVX512-BF16 engine vllm keeps them in float32: plan "
        "with mamba_ssm_cache_dtype float32 for one."
        for dtype in sorted(dtypes - {"float32"})
    ]
