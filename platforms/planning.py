"""From a model, a platform and a backend per layer to the finished plan. Needs neither torch nor the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from ..attention_backends.interface import Capabilities
from ..cache.block_size import Constraint, MultipleOf
from ..cache.capacity import Capacity, Holding, PoolShape, plan_capacity, useful_blocks
from ..cache.specs import AttentionSpec, LayerGroup, LayerSpec, MambaSpec
from ..config import EngineConfig
from ..device import DeviceFacts, format_bytes
from ..errors import BackendError, CapacityError, ConfigError
from ..hybrid.model_specs import ModelSpec
from .decision import BlockSizeDecision, BlockSizeRequest
from .interface import Platform
from .page_strategies import StrategyPlan, choose_strategy, state_bytes
from .plan import Plan, PlannedLayer

__all__ = ["Plan", "block_size_request", "plan_model", "without_idle_blocks"]

LENGTHS = (512, 4096, 32768, 131072)
"""Request lengths, in tokens, that concurrency is counted for, beside the longest."""
NOTABLE_PADDING_PCT = 10.0


def block_size_request(
    model: ModelSpec,
    backends: Mapping[int, Capabilities],
    config: EngineConfig,
    *,
    extra_constraints: Iterable[Constraint] = (),
    preferred_block_sizes: Mapping[str, int] | None = None,
    prefill_checkpoint_alignment: int | None = None,
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
        prefill_checkpoint_alignment=prefill_checkpoint_alignment,
        state_tokens=_state_tokens(model),
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
    prefill_checkpoint_alignment: int | None = None,
    reasons: Sequence[str] = (),
    refusals: Sequence[str] = (),
) -> Plan:
    """Decide block size, pages, groups and capacity.

    :param backends: per attention layer the capabilities of its backend.
    :param device: facts of the device; ``None`` plans without its memory.
    :param preferred_block_sizes: per backend name the block size that it would choose, in tokens.
    :param prefill_checkpoint_alignment: tokens at whose multiples the state kernels can stop in prefill.
    :param reasons: sentences of earlier decisions (platform, backends), put first.
    :param refusals: sentences about what was not chosen.
    :raises BlockSizeError: if no block size suits all, or the user's does not.
    :raises CapacityError: if one request cannot fit into the memory.
    :raises BackendError: if an attention layer has no backend.
    """
    _require_backends(model, backends)
    request = block_size_request(
        model,
        backends,
        config,
        extra_constraints=extra_constraints,
        preferred_block_sizes=preferred_block_sizes,
        prefill_checkpoint_alignment=prefill_checkpoint_alignment,
    )
    said = [*reasons, *model.notes]
    budget = None if config.cache.num_blocks is not None else _budget(model, config, device, said)
    chosen = choose_strategy(
        model,
        request,
        lambda asked: _with_set_kernel_block(platform.update_block_size_for_backend(asked), config),
        backends,
        config,
        budget,
    )
    decision, groups, shape = chosen.decision, chosen.groups, chosen.strategy.shape
    said += [*decision.reasons, *chosen.reasons]
    warnings = [*chosen.warnings, *_warnings(chosen)]
    capacity = _capacity(config, groups, shape, budget, request.max_model_len, said)
    max_model_len = _served_max_model_len(config, capacity, groups, shape, request.max_model_len, warnings)
    return Plan(
        model=model,
        platform=platform.name,
        decision=decision,
        strategy=chosen.strategy,
        groups=groups,
        layers=tuple(_planned(layer, backends, decision) for layer in model.layers),
        slots_per_block=chosen.slots_per_block,
        pool_bytes_per_block=shape.block_bytes if groups else 0,
        max_model_len=max_model_len,
        capacity=capacity,
        reasons=tuple(said),
        refusals=tuple(refusals),
        warnings=tuple(warnings),
    )


def without_idle_blocks(plan: Plan, config: EngineConfig) -> Plan:
    """The plan with a pool no larger than ``max_num_seqs`` longest requests can hold, where the user left it open."""
    cache, seqs = config.cache, config.scheduler.max_num_seqs
    if plan.capacity is None or cache.num_blocks is not None or cache.memory_bytes is not None:
        return plan
    shape = plan.strategy.shape
    useful = useful_blocks(plan.groups, shape, plan.max_model_len, seqs, _holding(config))
    if useful >= plan.capacity.num_blocks:
        return plan
    said = (
        f"capacity: {useful} blocks are all that {seqs} requests of {plan.max_model_len} tokens can hold, so that "
        f"{format_bytes(useful * shape.block_bytes)} of the memory are used."
    )
    capacity = _count(config, plan.groups, shape, None, useful, plan.max_model_len)
    return replace(plan, capacity=capacity, reasons=(*plan.reasons, said))


def _setting_constraints(backends: Mapping[int, Capabilities], config: EngineConfig) -> tuple[Constraint, ...]:
    """A mask block that the user set for flex is its kernel block, which the block has to be a multiple of."""
    wanted = config.attention.flex_attn_kv_block_size
    if wanted is None or all(backend.name != "flex" for backend in backends.values()):
        return ()
    return (MultipleOf(wanted, owner="flex_attn_kv_block_size"),)


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


def _state_tokens(model: ModelSpec) -> int:
    kinds = Counter(_attention(model.layers))
    per_token = sum(count * spec.bytes_per_token for spec, count in kinds.items())
    return -(-state_bytes(model.layers) // max(1, per_token))


def _planned(layer: LayerSpec, backends: Mapping[int, Capabilities], decision: BlockSizeDecision) -> PlannedLayer:
    if isinstance(layer.spec, MambaSpec):
        return PlannedLayer(layer=layer.layer, kind=layer.kind, backend=None, page_bytes=layer.spec.state_bytes)
    return PlannedLayer(
        layer=layer.layer,
        kind=layer.kind,
        backend=backends[layer.layer].name,
        page_bytes=layer.spec.page_size_bytes(decision.block_size),
    )


def _warnings(chosen: StrategyPlan) -> list[str]:
    """What costs memory more than one would expect, with the numbers."""
    found = []
    decision, groups, per_block = chosen.decision, chosen.groups, chosen.strategy.shape.block_bytes
    raw = decision.state_raw_bytes
    if raw and 100 * (decision.state_page_bytes - raw) > NOTABLE_PADDING_PCT * raw:
        pct = 100 * (decision.state_page_bytes - raw) / raw
        found.append(f"states of {raw} bytes take pages of {decision.state_page_bytes} bytes: padding of {pct:.1f} %.")
    floor = len(groups) * per_block
    if decision.block_size > 8 * decision.phase1_block_size:
        found.append(
            f"blocks grew from {decision.phase1_block_size} to {decision.block_size} tokens to hold a state, so that "
            f"the shortest request takes {format_bytes(floor)}: {len(groups)} groups x {format_bytes(per_block)}."
        )
    return found


def _capacity(
    config: EngineConfig,
    groups: Sequence[LayerGroup],
    shape: PoolShape,
    budget: int | None,
    max_model_len: int,
    reasons: list[str],
) -> Capacity | None:
    num_blocks = config.cache.num_blocks
    if not groups or (budget is None and num_blocks is None):
        reasons.append("capacity: not computed, no memory budget was given and the device's memory is not known.")
        return None
    return _count(config, groups, shape, budget, num_blocks, max_model_len)


def _count(
    config: EngineConfig,
    groups: Sequence[LayerGroup],
    shape: PoolShape,
    budget: int | None,
    num_blocks: int | None,
    max_model_len: int,
) -> Capacity:
    return plan_capacity(
        groups,
        shape,
        memory_bytes=budget,
        num_blocks=num_blocks,
        lengths=tuple(sorted({n for n in (*LENGTHS, max_model_len) if n <= max_model_len})),
        max_model_len=max_model_len,
        holding=_holding(config),
    )


def _holding(config: EngineConfig) -> Holding:
    """Sliding windows count in full: an engine that frees blocks early only needs less."""
    return Holding(mamba_cache_mode=config.cache.mamba_cache_mode)


def _budget(model: ModelSpec, config: EngineConfig, device: DeviceFacts | None, reasons: list[str]) -> int | None:
    """Bytes for the cache on this rank: the setting, or what the device has beside the weights."""
    if config.cache.memory_bytes is not None:
        reasons.append(f"memory: {format_bytes(config.cache.memory_bytes)} for the cache as the user set.")
        return config.cache.memory_bytes
    total = config.device.device_memory_bytes or (device.memory_bytes if device is not None else None)
    if total is None:
        return None
    share = int(total * config.cache.memory_fraction)
    weights = -(-(model.weights_bytes or 0) // model.tensor_parallel_size)
    known = f"{format_bytes(weights)} of weights" if weights else "weights, whose size is not known and counts as 0"
    reasons.append(
        f"memory: {config.cache.memory_fraction:g} of {format_bytes(total)} less {known} leaves "
        f"{format_bytes(max(0, share - weights))} for the cache."
    )
    if share <= weights:
        raise CapacityError(
            f"{config.cache.memory_fraction:g} of the device's {format_bytes(total)} is {format_bytes(share)}, and the "
            f"weights alone take {format_bytes(weights)}; use more memory, more ranks or a smaller model",
            option="memory_fraction",
            value=config.cache.memory_fraction,
            expected=f"more than {weights} bytes",
        )
    return share - weights


def _served_max_model_len(
    config: EngineConfig,
    capacity: Capacity | None,
    groups: Sequence[LayerGroup],
    shape: PoolShape,
    max_model_len: int,
    warnings: list[str],
) -> int:
    """The longest request: what the user asked for has to fit, the model's own maximum is cut to what fits."""
    if capacity is None or capacity.max_tokens >= max_model_len:
        return max_model_len
    needed = _holding(config).request_bytes(groups, shape, max_model_len)
    if config.model.max_model_len is not None:
        raise CapacityError(
            f"one request of max_model_len {max_model_len} needs {format_bytes(needed)} ({needed} bytes) of cache, and "
            f"there are {format_bytes(capacity.memory_bytes)}; the longest that fits is {capacity.max_tokens}",
            option="max_model_len",
            value=max_model_len,
            expected=f"<= {capacity.max_tokens}",
        )
    warnings.append(
        f"one request of the model's {max_model_len} tokens would need {format_bytes(needed)}; the longest that "
        f"fits and is served is {capacity.max_tokens}."
    )
    return capacity.max_tokens
