"""The five sizes that must be told apart, of one plan: what each of them is, and where it comes from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import lcm

from ..attention_backends.interface import Capabilities
from ..config import EngineConfig
from ..device import format_bytes
from ..hybrid.model_specs import ModelSpec
from .decision import BlockSizeDecision
from .orders import common_order, is_block_major
from .stages import StagePlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Tokens and bytes of one plan that often, but not always, are the same number."""

    kernel_block: Mapping[str, int]
    """Per attention backend what its kernel indexes, in tokens; divides ``block``."""
    block: int
    """What the pool hands out to an attention group, in tokens."""
    match: int | None
    """What a cached prefix is a whole number of, in tokens; ``None`` where no prefix can match."""
    match_reason: str
    checkpoint: int | None
    """Tokens between kept states; ``None`` where none are kept."""
    layout: str
    """Physical order of the pages; one of ``config.LAYOUTS``."""
    transfer_bytes: int
    """One contiguous run of what a block id stands for: a layer's page, or the whole block."""
    transfer_runs: int
    """Runs per block id; their bytes are all that the id stands for, in one stage."""
    state_transfer_bytes: int | None
    """The same for an id of a state group; ``None`` without states."""

    def to_dict(self) -> dict[str, object]:
        """JSON-ready values."""
        return {
            "kernel_block": dict(self.kernel_block),
            "block": self.block,
            "match": self.match,
            "match_reason": self.match_reason,
            "checkpoint": self.checkpoint,
            "layout": self.layout,
            "transfer_bytes": self.transfer_bytes,
            "transfer_runs": self.transfer_runs,
            "state_transfer_bytes": self.state_transfer_bytes,
        }

    def sentences(self) -> list[str]:
        """One per size, for people."""
        kernel = ", ".join(f"{name} indexes {size}" for name, size in self.kernel_block.items())
        match = f"{self.match} tokens" if self.match is not None else "nothing"
        kept = f"every {self.checkpoint} tokens" if self.checkpoint is not None else "nowhere on the way"
        runs = "one run" if self.transfer_runs == 1 else f"{self.transfer_runs} runs"
        states = ""
        if self.state_transfer_bytes not in (None, self.transfer_bytes):
            states = f", and for a state one of {self.state_transfer_bytes} bytes"
        return [
            f"sizes, kernel block: {kernel} tokens." if kernel else "sizes, kernel block: no attention kernel.",
            f"sizes, block: the pool hands out {self.block} tokens.",
            f"sizes, match: a prefix matches {match}; {self.match_reason}.",
            f"sizes, checkpoint: states are kept {kept}.",
            f"sizes, transfer: per block id {runs} of {format_bytes(self.transfer_bytes)} "
            f"({self.transfer_bytes} bytes) in {self.layout}{states}.",
        ]


def sizes_of(
    model: ModelSpec,
    decision: BlockSizeDecision,
    stage: StagePlan,
    backends: Iterable[Capabilities],
    config: EngineConfig,
) -> Sizes:
    """The sizes of a plan.

    :param stage: the stage whose blocks a transfer moves.
    :param backends: of the attention layers, in their order.
    """
    match, reason = _match(model, decision)
    order = _order(stage, backends, config)
    run, runs = _runs(stage, order)
    return Sizes(
        kernel_block=decision.kernel_block_sizes,
        block=decision.block_size,
        match=match,
        match_reason=reason,
        checkpoint=decision.mamba_block_size if _keeps_states(model, decision) else None,
        layout=order,
        transfer_bytes=run,
        transfer_runs=runs,
        state_transfer_bytes=_state_run(stage, run),
    )


def _keeps_states(model: ModelSpec, decision: BlockSizeDecision) -> bool:
    return bool(model.state_layers) and decision.mamba_cache_mode != "none"


def _match(model: ModelSpec, decision: BlockSizeDecision) -> tuple[int | None, str]:
    """What a prefix matches, and why."""
    block = lcm(decision.block_size, *decision.block_sizes.values())
    if not model.state_layers:
        return block, "whole blocks of K and V, there are no states"
    if not _keeps_states(model, decision) or decision.mamba_block_size is None:
        return None, "mamba_cache_mode none keeps no state at any boundary, and a prefix needs one to go on from"
    found = lcm(block, decision.mamba_block_size)
    return found, f"whole blocks of {block} at whose end a state is kept, every {found} tokens"


def _order(stage: StagePlan, backends: Iterable[Capabilities], config: EngineConfig) -> str:
    """As ``prepare`` chooses it; where no order suits all backends, which ``prepare`` refuses, the first one's."""
    if config.cache.layout != "auto":
        return config.cache.layout
    readable = [backend.layouts for backend in dict.fromkeys(backends)]
    several = stage.page_strategy == "subdivided" and stage.attention_group_width > 1
    return common_order(readable, block_major=several) or readable[0][0]


def _runs(stage: StagePlan, order: str) -> tuple[int, int]:
    """Bytes of one contiguous run of a block id, and how many there are."""
    if stage.page_strategy == "subdivided" or is_block_major(order):
        return stage.pool_bytes_per_block, 1
    return stage.page_bytes, stage.slots_per_block


def _state_run(stage: StagePlan, run: int) -> int | None:
    if not stage.state_bytes:
        return None
    return stage.shape.state_page_bytes if stage.page_strategy == "subdivided" else run
