"""Which page strategy a model gets: the one asked for, or what the engine has, the kernels reach and wastes least."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from ..attention_backends.interface import Capabilities
from ..cache.block_size import nearest_words
from ..cache.capacity import useful_blocks
from ..cache.specs import AttentionSpec, dtype_bytes, is_plain
from ..config import EngineConfig
from ..device import format_bytes
from ..errors import BlockSizeError, CapacityError, ConfigError
from ..hybrid.model_specs import ModelSpec
from .budget import holding_of
from .decision import BlockSizeRequest
from .mixed_pages import page_sizes_differ
from .page_strategies import Decide, StrategyPlan, plan_subdivided, plan_unified
from .stages import StagePlan

CLOSE = 0.001
"""Shares of waste that differ by less count as equal; unified is the simpler one then."""


def choose_strategy(
    model: ModelSpec,
    request: BlockSizeRequest,
    decide: Decide,
    backends: Mapping[int, Capabilities],
    config: EngineConfig,
    memory_bytes: int | None,
) -> StrategyPlan:
    """Plan the strategy that the user asked for, or the one that the engine supports and that wastes least.

    :param decide: the platform's decision of the block size.
    :param memory_bytes: what the pool may take, if that is known.
    :raises BlockSizeError: if no block size suits all.
    :raises CapacityError: if subdivided pages were asked for and no block suits all attention layers.
    :raises ConfigError: if subdivided pages were asked for and there is nothing to subdivide.
    """
    asked = config.cache.page_strategy
    if not model.is_hybrid and not page_sizes_differ(model):
        return _alone(model, request, decide, asked, config)
    planners = {
        "unified": lambda: plan_unified(model, request, decide, config),
        "subdivided": lambda: plan_subdivided(model, request, decide, backends, config),
    }
    if asked != "auto":
        other = "unified" if asked == "subdivided" else "subdivided"
        found, against = planners[asked](), _attempt(planners[other])
        return _said(
            found, f"page strategy: {asked}, as asked; it {_against(found, against)}.", _unknown_to(model, asked)
        )
    unified, subdivided = _attempt(planners["unified"]), _attempt(planners["subdivided"])
    if model.engine == "vllm":
        chosen = planners["unified"]() if isinstance(unified, str) else unified
        return _said(
            chosen, f"page strategy: unified, the one that engine vllm has; it {_against(chosen, subdivided)}."
        )
    if isinstance(subdivided, str):
        chosen = _last_hope(planners, subdivided) if isinstance(unified, str) else unified
        return _said(chosen, f"page strategy: unified; it {_against(chosen, subdivided)}.")
    if isinstance(unified, str):
        return _said(subdivided, f"page strategy: subdivided; it {_against(subdivided, unified)}.")
    out_of_reach = _out_of_reach(subdivided, backends, config, memory_bytes, request.max_model_len)
    if out_of_reach:
        return _said(unified, f"page strategy: unified, since {out_of_reach}; it {_against(unified, subdivided)}.")
    best = less_wasteful(unified, subdivided)
    worse = unified if best is subdivided else subdivided
    return _said(best, f"page strategy: {best.name}, by auto; it {_against(best, worse)}.")


def less_wasteful(unified: StrategyPlan, subdivided: StrategyPlan) -> StrategyPlan:
    """What ``auto`` takes where the engine has both."""
    gain = unified.waste_estimate - subdivided.waste_estimate
    return subdivided if gain > CLOSE else unified


def _alone(
    model: ModelSpec, request: BlockSizeRequest, decide: Decide, asked: str, config: EngineConfig
) -> StrategyPlan:
    """A model with only states, or only attention whose pages are alike, has one kind of page."""
    what = "states" if model.state_layers else "attention"
    if asked == "subdivided":
        raise ConfigError(
            f"page_strategy subdivided is refused: {model.name} stores only {what}, so that there is one kind of page; "
            "use auto or unified",
            option="page_strategy",
            value=asked,
            expected=["auto", "unified"],
        )
    return plan_unified(model, request, decide, config)


def _attempt(planner: Callable[[], StrategyPlan]) -> StrategyPlan | str:
    """The plan, or the sentence why there is none."""
    try:
        return planner()
    except (BlockSizeError, CapacityError) as error:
        return error.message


def _last_hope(planners: Mapping[str, Callable[[], StrategyPlan]], other: str) -> StrategyPlan:
    """The unified plan, the one that is left; its error names both, since each would send the user to the other."""
    try:
        return planners["unified"]()
    except CapacityError as error:
        raise CapacityError(
            f"no page strategy suits: {error.message}; and {other}",
            option=error.option,
            value="auto",
            expected="one KV dtype, or layers that fill blocks",
        ) from None
    except BlockSizeError as error:
        raise _nearest_of_both(error, planners["subdivided"]) from None


def _nearest_of_both(unified: BlockSizeError, subdivided: Callable[[], StrategyPlan]) -> BlockSizeError:
    """The refusal of the user's size, with the nearest sizes that work with either strategy."""
    try:
        subdivided()
    except BlockSizeError as error:
        size, hints = error.value, (error.expected, unified.expected)
        sizes = [n for hint in hints if isinstance(hint, tuple) for n in hint]
        if error.option == unified.option == "block_size" and isinstance(size, int) and sizes:
            below, above = [n for n in sizes if n < size], [n for n in sizes if n > size]
            nearest = (*([max(below)] if below else ()), *([min(above)] if above else ()))
            said = error.message.rpartition("; ")[0]
            return BlockSizeError(
                f"{said}; {nearest_words(nearest)}", option="block_size", value=size, expected=nearest
            )
    except CapacityError:
        pass
    return unified


def _against(found: StrategyPlan, other: StrategyPlan | str) -> str:
    said = f"wastes {found.waste_estimate:.2%} of the memory of a request of {found.estimate_tokens} tokens"
    if isinstance(other, str):
        return f"{said}, and the other strategy is impossible: {other}"
    return f"{said}, {other.name} {other.waste_estimate:.2%}"


def _said(found: StrategyPlan, reason: str, warning: str | None = None) -> StrategyPlan:
    warnings = found.warnings if warning is None else (*found.warnings, warning)
    return replace(found, reasons=(reason, *found.reasons), warnings=warnings)


def _unknown_to(model: ModelSpec, asked: str) -> str | None:
    if asked != "subdivided" or model.engine != "vllm":
        return None
    return "engine vllm itself knows unified pages only; this plan needs an engine that can subdivide them."


def _out_of_reach(
    subdivided: StrategyPlan,
    backends: Mapping[int, Capabilities],
    config: EngineConfig,
    memory_bytes: int | None,
    max_model_len: int,
) -> str | None:
    """Why a kernel cannot address blocks that lie all over the pool that will be used; ``None`` if every kernel can."""
    for stage in subdivided.stages:
        count = _used_blocks(stage, config, memory_bytes, max_model_len)
        if count is None:
            continue
        for group in stage.groups:
            for layer in group.layers:
                spec = layer.spec
                if not isinstance(spec, AttentionSpec) or spec.mla:  # latents are gathered before a kernel sees them
                    continue
                backend, size = backends[layer.layer], dtype_bytes(spec.dtype) if is_plain(spec.dtype) else 1
                limit = backend.max_view_elements
                if limit is not None and count * stage.shape.block_bytes > limit * size:
                    return (
                        f"{backend.name} addresses {limit} elements of a layer's K or V, and with subdivided pages "
                        f"they span the whole pool of {format_bytes(count * stage.shape.block_bytes)}"
                    )
    return None


def _used_blocks(stage: StagePlan, config: EngineConfig, memory_bytes: int | None, max_model_len: int) -> int | None:
    """Blocks that the pool of ``stage`` will have; ``None`` if that is not known.

    A pool that the user left open is trimmed to what all requests at once can hold, see ``without_idle_blocks``.
    """
    if config.cache.num_blocks is not None:
        return config.cache.num_blocks
    if memory_bytes is None:
        return None
    there = memory_bytes // stage.shape.block_bytes
    if config.cache.memory_bytes is not None:
        return there
    seqs = config.scheduler.max_num_seqs
    return min(there, useful_blocks(stage.groups, stage.shape, max_model_len, seqs, holding_of(config)))
