"""The two ways to share one pool between states and attention, each carried out for all stages of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..attention_backends.interface import Capabilities
from ..cache.capacity import PoolShape
from ..config import EngineConfig
from ..device import format_bytes
from ..hybrid.model_specs import ModelSpec
from .budget import holding_of
from .decision import BlockSizeDecision, BlockSizeRequest
from .mixed_pages import padded_attention
from .stages import StagePlan, subdivided_stages, unified_stages, waste_of

ESTIMATE_TOKENS = 1000
"""Tokens of the request that strategies are compared on, or the longest request if that is shorter."""

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


def plan_unified(model: ModelSpec, request: BlockSizeRequest, decide: Decide, config: EngineConfig) -> StrategyPlan:
    """The block grows until its page covers the largest state; a state takes a block.

    :raises CapacityError: if layers of several KV dtypes would leave more than half of the attention pages empty.
    """
    decision = decide(replace(request, page_strategy="unified"))
    padded, warnings = ((), ()) if decision.block_sizes else padded_attention(model, decision)
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
