"""Phases 1 to 3: from a request to the one KV block size that every kernel and state can live with.

Pure functions of frozen records; :class:`~makeready.platforms.interface.Platform` is the door.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from ..attention_backends.interface import Capabilities
from ..cache.block_size import (
    AtLeastPage,
    Constraint,
    Divides,
    MultipleOf,
    check,
    checked,
    largest_accepted,
    smallest_accepted,
    solve,
)
from ..cache.specs import AttentionSpec, MambaSpec
from ..hybrid.page_alignment import (
    Pages,
    alignment_preferences,
    bytes_per_token,
    largest_state,
    separate_pages,
    state_constraints,
    unified_pages,
)
from .decision import BlockSizeDecision, BlockSizeRequest
from .kept_states import MAMBA_BLOCK_SIZE, check_mamba_block_size, kept_every, require_kept_states
from .kernel_blocks import kernel_block_size, kernel_constraints, preferred_block_size
from .mixed_blocks import MixedBlocks, covering_rule, mixed_blocks, pages_differ, phase3_applies, quantised


def decide(
    request: BlockSizeRequest,
    *,
    platform: str,
    default_block_size: int,
    declared: Sequence[Constraint] = (),
    covers_skipped_layers: bool = True,
) -> BlockSizeDecision:
    """Phase 1, then phase 2, then phase 3 where layers of several KV dtypes get blocks of their own length.

    :param declared: constraints that the platform adds for the kinds of states in the request.
    :param covers_skipped_layers: whether blocks grow for layers that keep the model's dtype.
    :raises BlockSizeError: naming the owners that clash, or the user's size and the nearest that work.
    :raises ConfigError: for a ``mamba_block_size`` where no states are kept.
    """
    require_kept_states(request)
    backends = _distinct(request.backends)
    reasons: list[str] = []
    kernels = checked([*kernel_constraints(backends), *declared, *request.extra_constraints])
    covering = covering_rule(request, backends) if phase3_applies(request) and covers_skipped_layers else None
    hard = checked([*kernels, *_phase2_constraints(request)])
    check_mamba_block_size(request, hard)
    if request.block_size is not None:
        check(request.block_size, [*hard, *([covering] if covering else [])])
    phase1 = _phase1(request, backends, kernels, platform, default_block_size, reasons)
    block_size = checkpoint = _phase2(request, phase1, hard, reasons)
    block_sizes: Mapping[AttentionSpec, int] = MappingProxyType({})
    own_pages = False
    if _subdivides(request):
        pages = separate_pages(request.attention, request.states, block_size)
    elif covering is not None or pages_differ(request, backends, block_size):
        if covering is not None:
            block_size = _phase3(block_size, hard, covering, reasons)
            hard = checked([*hard, covering])
        mixed = mixed_blocks(request, backends, block_size, covered=covering is not None)
        reasons += mixed.reasons
        pages, block_sizes, own_pages = _mixed_pages(request, mixed, reasons), mixed.block_sizes, mixed.own_pages
    else:
        pages = unified_pages(request.attention, request.states, block_size)
        _explain_pages(request, pages, block_size, reasons)
    return BlockSizeDecision(
        block_size=block_size,
        kernel_block_sizes=MappingProxyType({b.name: kernel_block_size(b, block_size) for b in backends}),
        attention_bytes_per_token=pages.attention_bytes_per_token,
        attention_page_bytes=pages.attention_page_bytes,
        state_raw_bytes=pages.state_raw_bytes,
        state_page_bytes=pages.state_page_bytes,
        mamba_page_size_padded=pages.mamba_page_size_padded,
        mamba_block_size=kept_every(request, checkpoint, reasons),
        mamba_cache_mode=request.mamba_cache_mode,
        phase1_block_size=phase1,
        page_bytes=pages.page_bytes,
        page_strategy=request.page_strategy,
        constraints=hard,
        reasons=tuple(reasons),
        block_sizes=block_sizes,
        own_pages=own_pages,
    )


def _subdivides(request: BlockSizeRequest) -> bool:
    return request.page_strategy == "subdivided"


def _distinct(backends: Iterable[Capabilities]) -> tuple[Capabilities, ...]:
    """Attention backends, each once, by name: the caller's order must not matter."""
    return tuple(sorted({b for b in backends if not b.is_ssm}, key=lambda b: b.name))


def _phase1(
    request: BlockSizeRequest,
    backends: Sequence[Capabilities],
    kernels: Sequence[Constraint],
    platform: str,
    default: int,
    reasons: list[str],
) -> int:
    """The size that kernels like best; the user's own where there is one."""
    if request.block_size is not None:
        reasons.append(f"phase 1: block_size {request.block_size} is the user's and suits every attention kernel.")
        return request.block_size
    wishes = {b.name: request.preferred_block_sizes.get(b.name) or preferred_block_size(b, default) for b in backends}
    start = max(wishes.values(), default=default)
    size = smallest_accepted(kernels, start) or largest_accepted(kernels, start) or solve(kernels)
    said = ", ".join(f"{name} prefers {wish}" for name, wish in wishes.items()) or "there is no attention backend"
    reasons.append(
        f"phase 1: {said} from {platform}'s default of {default}; the block next to that which all accept is {size}."
    )
    return size


def _phase2_constraints(request: BlockSizeRequest) -> tuple[Constraint, ...]:
    """What states ask for, hard."""
    rules = [] if _subdivides(request) else [*state_constraints(quantised(request), request.states)]
    if not request.states or request.mamba_cache_mode == "none":
        return tuple(rules)
    if request.prefill_checkpoint_alignment is not None:
        rules.append(MultipleOf(request.prefill_checkpoint_alignment, owner="state checkpoints in prefill"))
    if request.mamba_block_size is not None:
        rules.append(Divides(request.mamba_block_size, owner=MAMBA_BLOCK_SIZE))
    return tuple(rules)


def _phase2(request: BlockSizeRequest, phase1: int, hard: tuple[Constraint, ...], reasons: list[str]) -> int:
    """The smallest block that holds the largest state and suits everybody."""
    if not request.states:
        reasons.append("phase 2: skipped, the model has no state layers.")
        return phase1
    if request.block_size is not None:
        reasons.append(f"phase 2: block_size {request.block_size} is kept, every constraint accepts it.")
        return request.block_size
    if not request.attention:
        reasons.append("phase 2: the model has no attention; a page is a state and the block size counts nothing.")
    if _subdivides(request):
        wished = checked([*hard, MultipleOf(phase1, owner="the phase 1 block size")])
    else:
        wished = checked([*hard, *alignment_preferences(request.attention, phase1)])
    size = smallest_accepted(wished, phase1)
    if size is None:
        size, wished = solve(hard), hard
        reasons.append(
            f"phase 2: no block is a multiple of the phase 1 block size {phase1} and suits all, so that this "
            "preference is dropped."
        )
    if request.attention:
        rules = "; ".join(f"{rule.owner} needs {rule.describe()}" for rule in wished)
        free = "pages are subdivided, so that no block has to hold a state; " if _subdivides(request) else ""
        reasons.append(f"phase 2: {free}{rules}; the smallest block that suits all is {size}.")
    return size


def _phase3(size: int, hard: tuple[Constraint, ...], covering: AtLeastPage, reasons: list[str]) -> int:
    """The block of phase 2, as many times as the rule asks.

    :raises BlockSizeError: if no multiple suits all, naming the owners.
    """
    rules = [*hard, covering]
    grown = smallest_accepted(checked([*rules, MultipleOf(size, owner="the phase 2 block size")]), size)
    if grown is None:
        grown = solve(rules)
    said = f"stays {grown}" if grown == size else f"grows from {size} to {grown}"
    reasons.append(f"phase 3: {covering.owner} needs {covering.describe()}; the block {said}.")
    return grown


def _mixed_pages(request: BlockSizeRequest, mixed: MixedBlocks, reasons: list[str]) -> Pages:
    """One page for layers of several KV dtypes and for states."""
    state = largest_state(request.states)
    raw = state.state_bytes if state is not None else 0
    pages = Pages(
        attention_bytes_per_token=bytes_per_token(request.attention),
        attention_page_bytes=mixed.page_bytes,
        state_raw_bytes=raw,
        state_page_bytes=mixed.page_bytes if raw else 0,
        page_bytes=mixed.page_bytes,
        mamba_page_size_padded=mixed.page_bytes if raw and raw != mixed.page_bytes else None,
    )
    if state is not None and pages.mamba_page_size_padded is not None:
        reasons.append(f"pages: {_padded(state, pages)}")
    return pages


def _explain_pages(request: BlockSizeRequest, pages: Pages, block_size: int, reasons: list[str]) -> None:
    state = largest_state(request.states)
    if state is None or not request.attention:
        return
    if pages.mamba_page_size_padded is None:
        reasons.append(
            f"pages: the {state.kind} state of {pages.state_raw_bytes} bytes fills the attention page exactly."
        )
        return
    reasons.append(
        f"pages: {block_size} tokens x {pages.attention_bytes_per_token} bytes = {pages.attention_page_bytes} bytes; "
        f"{_padded(state, pages)}"
    )


def _padded(state: MambaSpec, pages: Pages) -> str:
    padding = pages.page_bytes - pages.state_raw_bytes
    return (
        f"the {state.kind} state of {pages.state_raw_bytes} bytes is padded by {padding} "
        f"({100 * padding / pages.state_raw_bytes:.2f} %)."
    )
