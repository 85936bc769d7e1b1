"""From a model, a platform and a backend per layer to the finished plan. Needs neither torch nor the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from ..attention_backends.interface import Capabilities
from ..cache.block_size import Constraint, MultipleOf
from ..cache.capacity import useful_blocks
from ..cache.specs import LATENT_BLOBS, AttentionSpec, LayerSpec, MambaSpec
from ..config import EngineConfig
from ..device import DeviceFacts, format_bytes
from ..errors import BackendError, ConfigError
from ..hybrid.model_specs import ModelSpec
from .budget import cache_budget, holding_of, served_max_model_len, with_capacities
from .cautions import dear_blocks, idle_settings, idle_stages, reset_states
from .decision import BlockSizeDecision, BlockSizeRequest
from .interface import Platform
from .plan import Plan, PlannedLayer
from .sizes import sizes_of
from .stages import StagePlan, state_bytes, tightest, whole_capacity
from .strategy_choice import choose_strategy

__all__ = ["Plan", "block_size_request", "plan_model", "with_num_blocks", "without_idle_blocks"]


def block_size_request(
    model: ModelSpec,
    backends: Mapping[int, Capabilities],
    config: EngineConfig,
    *,
    extra_constraints: Iterable[Constraint] = (),
    preferred_block_sizes: Mapping[str, int] | None = None,
) -> BlockSizeRequest:
    """What the platform decides the block size from; plugins may look at it before it gets their constraints.

    :param backends: per attention layer the capabilities of its backend.
    """
    cache = config.cache
    return BlockSizeRequest(
        attention=tuple(dict.fromkeys(_attention(model.layers))),
        states=tuple(dict.fromkeys(_states(model.layers))),
        backends=tuple(dict.fromkeys(backends[layer.layer] for layer in model.attention_layers)),
        preferred_block_sizes=MappingProxyType(dict(preferred_block_sizes or {})),
        block_size=cache.block_size,
        mamba_block_size=cache.mamba_block_size,
        mamba_cache_mode=cache.mamba_cache_mode,
        max_model_len=_asked_max_model_len(model, config),
        prefill_checkpoint_alignment=cache.mamba_prefill_checkpoint_alignment,
        state_tokens=_state_tokens(model),
        quantised_dtype=_quantised_dtype(model),
        extra_constraints=(*extra_constraints, *_setting_constraints(backends, config)),
    )


def plan_model(
    model: ModelSpec,
    platform: Platform,
    backends: Mapping[int, Capabilities],
    config: EngineConfig,
    device: DeviceFacts | None = None,
    *,
    extra_constraints: Iterable[Constraint] = (),
    preferred_block_sizes: Mapping[str, int] | None = None,
    workspace: Callable[[int], int] | None = None,
    reasons: Sequence[str] = (),
    refusals: Sequence[str] = (),
) -> Plan:
    """Decide block size, pages, groups and capacity, the block size for the whole model, the rest stage by stage.

    :param backends: per attention layer the capabilities of its backend.
    :param device: facts of the device; ``None`` plans without its memory.
    :param preferred_block_sizes: per backend name the block size that it would choose, in tokens.
    :param workspace: bytes that the backends' kernels take beside the cache, by the longest sequence in tokens.
    :param reasons: sentences of earlier decisions (platform, backends), put first.
    :param refusals: sentences about what was not chosen.
    :raises BlockSizeError: if no block size suits all, or the user's does not.
    :raises CapacityError: if one request cannot fit into the memory.
    :raises ConfigError: if there are more pipeline stages than layers.
    :raises BackendError: if an attention layer has no backend.
    """
    _require_backends(model, backends)
    request = block_size_request(
        model,
        backends,
        config,
        extra_constraints=extra_constraints,
        preferred_block_sizes=preferred_block_sizes,
    )
    said = [*reasons, *model.notes]
    mind: list[str] = []
    budget = None if config.cache.num_blocks is not None else cache_budget(model, config, device, said, mind, workspace)
    chosen = choose_strategy(
        model,
        request,
        lambda asked: _with_set_kernel_block(platform.update_block_size_for_backend(asked), config),
        backends,
        config,
        budget,
    )
    decision = chosen.decision
    said += [*_pipeline(chosen.stages), *decision.reasons, *chosen.reasons]
    stages = with_capacities(chosen.stages, config, budget, config.cache.num_blocks, request.max_model_len)
    tight, capacity = tightest(stages, holding_of(config), request.max_model_len), whole_capacity(stages)
    warnings = [
        *mind,
        *chosen.warnings,
        *idle_settings(config, {backend.name for backend in backends.values()}),
        *dear_blocks(decision, tight, holding_of(config)),
        *idle_stages(stages),
        *reset_states(model, platform, config),
    ]
    if capacity is None:
        said.append("capacity: not computed, no memory budget was given and the device's memory is not known.")
    sizes = sizes_of(model, decision, tight, backends.values(), config)
    said += sizes.sentences()
    max_model_len = served_max_model_len(config, capacity, stages, request.max_model_len, warnings)
    return Plan(
        model=model,
        platform=platform.name,
        decision=decision,
        strategy=chosen.of_stage(tight),
        groups=tight.groups,
        layers=tuple(_planned(layer, backends, decision) for layer in model.layers),
        slots_per_block=tight.slots_per_block,
        pool_bytes_per_block=tight.pool_bytes_per_block,
        max_model_len=max_model_len,
        capacity=capacity,
        stages=stages,
        tightest_stage=tight.index,
        replicas=config.parallel.data_parallel_size,
        sizes=sizes,
        holding=holding_of(config),
        reasons=tuple(said),
        refusals=tuple(refusals),
        warnings=tuple(warnings),
    )


def without_idle_blocks(plan: Plan, config: EngineConfig) -> Plan:
    """The plan with pools no larger than ``max_num_seqs`` longest requests can hold, where the user left them open."""
    cache, seqs, holding = config.cache, config.scheduler.max_num_seqs, holding_of(config)
    if plan.capacity is None or cache.num_blocks is not None or cache.memory_bytes is not None:
        return plan
    counts, said = [], []
    for stage in plan.stages:
        useful = useful_blocks(stage.groups, stage.shape, plan.max_model_len, seqs, holding)
        there = stage.capacity.num_blocks if stage.capacity is not None else 0
        counts.append(min(useful, there))
        if useful < there:
            where = f"{stage.name}: " if len(plan.stages) > 1 else ""
            said.append(
                f"capacity: {where}{useful} blocks are all that {seqs} requests of {plan.max_model_len} tokens can "
                f"hold, so that {format_bytes(useful * stage.shape.block_bytes)} of the memory are used."
            )
    return with_num_blocks(plan, config, counts, said) if said else plan


def with_num_blocks(plan: Plan, config: EngineConfig, num_blocks: Sequence[int], reasons: Sequence[str]) -> Plan:
    """The plan with pools of ``num_blocks`` blocks, one number per stage.

    :param reasons: sentences that say why.
    :raises CapacityError: if one request of the planned longest length does not fit any more.
    """
    stages = with_capacities(plan.stages, config, None, num_blocks, plan.max_model_len)
    capacity = whole_capacity(stages)
    warnings = list(plan.warnings)
    longest = served_max_model_len(config, capacity, stages, plan.max_model_len, warnings)
    return replace(
        plan,
        stages=stages,
        capacity=capacity,
        max_model_len=longest,
        reasons=(*plan.reasons, *reasons),
        warnings=tuple(warnings),
    )


def _pipeline(stages: Sequence[StagePlan]) -> list[str]:
    if len(stages) == 1:
        return []
    counts = [str(len(stage.layers)) for stage in stages]
    return [
        f"pipeline: {sum(len(stage.layers) for stage in stages)} layers in {len(stages)} stages of "
        f"{', '.join(counts)}; one block size for all, each stage has pages and a pool of its own."
    ]


def _setting_constraints(backends: Mapping[int, Capabilities], config: EngineConfig) -> tuple[Constraint, ...]:
    """Flex's mask block, where the user set it, is its kernel block, which divides the block; so does a kernel tile."""
    if all(backend.name != "flex" for backend in backends.values()):
        return ()
    wanted = {name: getattr(config.attention, name) for name in ("flex_attn_kv_block_size", "flex_attn_block_n")}
    return tuple(MultipleOf(tokens, owner=name) for name, tokens in wanted.items() if tokens is not None)


def _with_set_kernel_block(decision: BlockSizeDecision, config: EngineConfig) -> BlockSizeDecision:
    """The decision, with flex's kernel block as the user set it."""
    wanted, sizes = config.attention.flex_attn_kv_block_size, decision.kernel_block_sizes
    if wanted is None or "flex" not in sizes:
        return decision
    return replace(decision, kernel_block_sizes=MappingProxyType({**sizes, "flex": wanted}))


def _attention(layers: Iterable[LayerSpec]) -> Iterable[AttentionSpec]:
    return (layer.spec for layer in layers if isinstance(layer.spec, AttentionSpec))


def _states(layers: Iterable[LayerSpec]) -> Iterable[MambaSpec]:
    return (layer.spec for layer in layers if isinstance(layer.spec, MambaSpec))


def _require_backends(model: ModelSpec, backends: Mapping[int, Capabilities]) -> None:
    missing = [layer.layer for layer in model.attention_layers if layer.layer not in backends]
    if missing:
        raise BackendError(
            f"attention layers {missing} of {model.name} have no backend; each needs one",
            option="backend",
            value=missing,
            expected="a backend for every attention layer",
        )


def _asked_max_model_len(model: ModelSpec, config: EngineConfig) -> int:
    """The user's longest sequence, which the model has to allow, or the model's."""
    asked = config.model.max_model_len
    if asked is None:
        return model.max_model_len
    if asked > model.max_model_len:
        raise ConfigError(
            f"max_model_len {asked} is more than the {model.max_model_len} tokens that {model.name} allows",
            option="max_model_len",
            value=asked,
            expected=f"<= {model.max_model_len}",
        )
    return asked


def _quantised_dtype(model: ModelSpec) -> str | None:
    """What vLLM sizes blocks for, where skipped layers, packed latents or windows may have other pages than that.

    The embedded engine pads pages instead, and so does a plan for layers that no setting of vLLM's gives.
    """
    stored = {spec.dtype for spec in _attention(model.layers)}
    differ = stored - {model.kv_cache_dtype}
    heads = {(x.num_kv_heads, x.head_size, x.head_size_v, x.mla) for x in _attention(model.layers)}
    windows = any(spec.sliding_window is not None for spec in _attention(model.layers))
    known = differ == {model.dtype} or (not differ and (windows or stored & LATENT_BLOBS.keys()))
    return model.kv_cache_dtype if known and len(heads) == 1 and model.engine == "vllm" else None


def _state_tokens(model: ModelSpec) -> int:
    kinds = Counter(_attention(model.layers))
    per_token = sum(count * spec.bytes_per_token for spec, count in kinds.items())
    return -(-state_bytes(model.layers) // max(1, per_token))


def _planned(layer: LayerSpec, backends: Mapping[int, Capabilities], decision: BlockSizeDecision) -> PlannedLayer:
    if isinstance(layer.spec, MambaSpec):
        return PlannedLayer(
            layer=layer.layer, kind=layer.kind, backend=None, page_bytes=layer.spec.state_bytes, kv_cache_dtype=None
        )
    return PlannedLayer(
        layer=layer.layer,
        kind=layer.kind,
        backend=backends[layer.layer].name,
        page_bytes=layer.spec.bytes_per_token * decision.block_size_of(layer.spec),
        kv_cache_dtype=layer.spec.dtype,
    )
