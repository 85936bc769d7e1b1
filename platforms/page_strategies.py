"""The two ways to share one pool between states and attention, planned for a model, and which one ``auto`` takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..attention_backends.interface import Capabilities
from ..cache.capacity import PoolShape
from ..cache.specs import AttentionSpec, dtype_bytes, is_plain
from ..config import EngineConfig
from ..device import format_bytes
from ..errors import BlockSizeError, CapacityError, ConfigError
from ..hybrid.model_specs import ModelSpec
from .budget import holding_of
from .decision import BlockSizeDecision, BlockSizeRequest
from .mixed_pages import padded_attention, page_sizes_differ
from .stages import StagePlan, subdivided_stages, unified_stages, waste_of

ESTIMATE_TOKENS = 1000
"""Tokens of the request that strategies are compared on, or the longest request if that is shorter."""
CLOSE = 0.001
"""Shares of waste that differ by less count as equal; unified is the simpler one then."""

Decide = Callable[[BlockSizeRequest], BlockSizeDecision]


@dataclass(frozen=True, slots=True, kw_only=True)
class PageStrategy:
    """How pages are laid out for a model, and what that wastes."""

    name: str
    """``unified`` or ``subdivided``."""
    shape: PoolShape
    attention_group_width: int
    """Layers of the widest attention group; 0 without attention."""
    state_bytes: int
    """What the states of one request need, all layers, in bytes, without any rounding."""
    estimate_tokens: int
    waste_estimate: float
    """Share of the memory of one request of ``estimate_tokens`` tokens that holds nothing."""

    @property
    def state_page_bytes(self) -> int:
        """Bytes that one id of a state group takes from the pool."""
        return self.shape.state_page_bytes

    def describe(self) -> str:
        """What the states of a request take, in words."""
        padding = self.state_page_bytes - self.state_bytes
        if self.shape.states_per_block > 1:
            where = f"{self.shape.states_per_block} requests share a block"
        else:
            where = f"{self.shape.state_page_blocks} blocks"
        return (
            f"{format_bytes(self.state_page_bytes)} a request ({where}), padded by "
            f"{100 * padding / max(1, self.state_bytes):.2f} %"
        )

    def to_dict(self) -> dict[str, object]:
        """JSON-ready values; waste in percent."""
        return {
            "page_strategy": self.name,
            "state_page_blocks": self.shape.state_page_blocks,
            "states_per_block": self.shape.states_per_block,
            "attention_group_width": self.attention_group_width,
            "request_state_bytes": self.state_bytes,
            "request_state_page_bytes": self.state_page_bytes,
            "waste_estimate_tokens": self.estimate_tokens,
            "waste_estimate_pct": round(100 * self.waste_estimate, 4),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyPlan:
    """One strategy, carried out for all stages of a model."""

    name: str
    decision: BlockSizeDecision
    stages: tuple[StagePlan, ...]
    estimate_tokens: int
    waste_estimate: float
    """Share of the memory of one request of ``estimate_tokens`` tokens, over all stages, that holds nothing."""
    reasons: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    def of_stage(self, stage: StagePlan) -> PageStrategy:
        """The strategy with the pages of ``stage``."""
        return PageStrategy(
            name=self.name,
            shape=stage.shape,
            attention_group_width=stage.attention_group_width,
            state_bytes=stage.state_bytes,
            estimate_tokens=self.estimate_tokens,
            waste_estimate=self.waste_estimate,
        )


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
        chosen = _last_hope(planners["unified"], subdivided) if isinstance(unified, str) else unified
        return _said(chosen, f"page strategy: unified; it {_against(chosen, subdivided)}.")
    if isinstance(unified, str):
        return _said(subdivided, f"page strategy: subdivided; it {_against(subdivided, unified)}.")
    out_of_reach = _out_of_reach(model, backends.values(), memory_bytes)
    if out_of_reach:
        return _said(unified, f"page strategy: unified, since {out_of_reach}; it {_against(unified, subdivided)}.")
    best = less_wasteful(unified, subdivided)
    worse = unified if best is subdivided else subdivided
    return _said(best, f"page strategy: {best.name}, by auto; it {_against(best, worse)}.")


def less_wasteful(unified: StrategyPlan, subdivided: StrategyPlan) -> StrategyPlan:
    """What ``auto`` takes where the engine has both."""
    gain = unified.waste_estimate - subdivided.waste_estimate
    return subdivided if gain > CLOSE else unified


def plan_unified(model: ModelSpec, request: BlockSizeRequest, decide: Decide, config: EngineConfig) -> StrategyPlan:
    """The block grows until its page covers the largest state; a state takes a block.

    :raises CapacityError: if layers of several KV dtypes would leave more than half of the attention pages empty.
    """
    decision = decide(replace(request, page_strategy="unified"))
    padded, warnings = padded_attention(model, decision)
    stages = unified_stages(
        model, decision, config.parallel.pipeline_parallel_size, decision.mamba_block_size or request.max_model_len
    )
    reasons = [f"{where}{_unified_groups(stage)}" for stage, where in _said_where(stages)]
    return _strategy("unified", request, config, decision, stages, (*padded, *reasons), warnings)


def plan_subdivided(
    model: ModelSpec,
    request: BlockSizeRequest,
    decide: Decide,
    backends: Mapping[int, Capabilities],
    config: EngineConfig,
) -> StrategyPlan:
    """The block stays what the kernels like; all states of a request take a whole number of blocks, or share one."""
    decision = decide(replace(request, page_strategy="subdivided"))
    widest = None if reads_block_major(backends.values(), config.cache.layout) else 1
    stages = subdivided_stages(
        model,
        decision,
        config.parallel.pipeline_parallel_size,
        decision.mamba_block_size or request.max_model_len,
        widest,
    )
    reasons = [
        f"{where}{reason}"
        for stage, where in _said_where(stages)
        for reason in _subdivided_reasons(stage, decision.block_size, widest)
    ]
    return _strategy("subdivided", request, config, decision, stages, tuple(reasons))


def reads_block_major(backends: Iterable[Capabilities], layout: str) -> bool:
    """Whether a block may hold pages of several layers: the layout asked for, or one that all backends read."""
    if layout != "auto":
        return layout.startswith("cross_layer_")
    orders = [set(backend.layouts) for backend in backends]
    return any(order.startswith("cross_layer_") for order in set.intersection(*orders))


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


def _last_hope(planner: Callable[[], StrategyPlan], other: str) -> StrategyPlan:
    """The plan of the one strategy that is left; its error names both, since each would send the user to the other."""
    try:
        return planner()
    except CapacityError as error:
        raise CapacityError(
            f"no page strategy suits: {error.message}; and {other}",
            option=error.option,
            value="auto",
            expected="one KV dtype, or layers that fill blocks",
        ) from None


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


def _out_of_reach(model: ModelSpec, backends: Iterable[Capabilities], memory_bytes: int | None) -> str | None:
    """Why a kernel cannot address blocks that lie all over the pool; ``None`` if every kernel can."""
    if memory_bytes is None:
        return None
    specs = [layer.spec for layer in model.attention_layers if isinstance(layer.spec, AttentionSpec)]
    size = min((dtype_bytes(spec.dtype) if is_plain(spec.dtype) else 1 for spec in specs), default=1)
    for backend in backends:
        limit = backend.max_view_elements
        if limit is not None and memory_bytes > limit * size:
            return (
                f"{backend.name} addresses {limit} elements of a layer's K or V, and with subdivided pages they span "
                f"the whole pool of {format_bytes(memory_bytes)}"
            )
    return None


def _strategy(
    name: str,
    request: BlockSizeRequest,
    config: EngineConfig,
    decision: BlockSizeDecision,
    stages: tuple[StagePlan, ...],
    reasons: tuple[str, ...],
    warnings: tuple[str, ...] = (),
) -> StrategyPlan:
    tokens = min(ESTIMATE_TOKENS, request.max_model_len)
    return StrategyPlan(
        name=name,
        decision=decision,
        stages=stages,
        estimate_tokens=tokens,
        waste_estimate=waste_of(stages, holding_of(config), tokens),
        reasons=reasons,
        warnings=warnings,
    )


def _said_where(stages: Sequence[StagePlan]) -> list[tuple[StagePlan, str]]:
    """Stages that store something, each with what its sentences start with: nothing where it is the only one."""
    return [(stage, f"{stage.name}: " if len(stages) > 1 else "") for stage in stages if stage.groups]


def _unified_groups(stage: StagePlan) -> str:
    sizes = ", ".join(f"{len(group.layers)} x {group.kind}" for group in stage.groups)
    return (
        f"groups: {len(stage.groups)} ({sizes}); a block id serves one group and takes {stage.shape.block_bytes} "
        "bytes, pages for the largest."
    )


def _subdivided_reasons(stage: StagePlan, block_size: int, widest: int | None) -> list[str]:
    shape, attention = stage.shape, [group for group in stage.groups if not group.is_state]
    found = []
    if attention:
        sizes = ", ".join(f"{len(group.layers)} x {group.kind}" for group in attention)
        narrow = ", one layer a block as the layout keeps a layer's pages together" if widest == 1 else ""
        found.append(
            f"groups: {len(attention)} of attention ({sizes}){narrow}; a block of {block_size} tokens takes "
            f"{shape.block_bytes} bytes."
        )
    if stage.state_bytes:
        if shape.states_per_block > 1:
            how = f"{shape.states_per_block} requests' states share one block"
        elif attention:
            how = f"they take a state page of {shape.state_page_blocks} blocks"
        else:
            how = "a block is one state page"
        padding = shape.state_page_bytes - stage.state_bytes
        count = sum(len(group.layers) for group in stage.groups if group.is_state)
        found.append(
            f"states: all {count} of a request need {stage.state_bytes} bytes; {how}, {shape.state_page_bytes} "
            f"bytes each, padded by {padding} ({100 * padding / stage.state_bytes:.2f} %)."
        )
    return found
