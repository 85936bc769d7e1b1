"""Where states are kept: the user's ``mamba_block_size``, respected or refused, and what stands in for it."""

from __future__ import annotations

from ..cache.block_size import Constraint, OneOf, largest_accepted, smallest_accepted, solve
from ..errors import BlockSizeError, ConfigError
from .decision import BlockSizeRequest

MAMBA_BLOCK_SIZE = "mamba_block_size"
"""Owner of the constraint that the user's ``mamba_block_size`` makes."""


def require_kept_states(request: BlockSizeRequest) -> None:
    """Refuse a mamba_block_size where no states are kept at block boundaries.

    :raises ConfigError: saying why there are none.
    """
    if request.mamba_block_size is None:
        return
    if not request.states:
        why = "the model has no state layers"
    elif request.mamba_cache_mode == "none":
        why = "mamba_cache_mode none keeps one state per request and none at block boundaries"
    else:
        return
    raise ConfigError(
        f"mamba_block_size {request.mamba_block_size} is refused: {why}; leave it out, or use mamba_cache_mode "
        "align or all with a model that has states",
        option="mamba_block_size",
        value=request.mamba_block_size,
        expected="mamba_cache_mode align or all",
    )


def check_mamba_block_size(request: BlockSizeRequest, hard: tuple[Constraint, ...]) -> None:
    """Refuse a mamba_block_size that no block divides, with the nearest values that work.

    :raises BlockSizeError: naming what else the block has to satisfy.
    """
    if request.mamba_block_size is None or smallest_accepted(hard, 1) is not None:
        return
    others = tuple(rule for rule in hard if rule.owner != MAMBA_BLOCK_SIZE)
    least = solve(others)
    wanted = request.mamba_block_size
    finite = [rule for rule in others if isinstance(rule, OneOf)]
    if finite:
        values = tuple(sorted({m for n in finite[0].sizes for m in (wanted // n * n, -(-wanted // n) * n) if m}))
    else:
        values = tuple(n for n in (largest_accepted(others, wanted), smallest_accepted(others, wanted)) if n)
    said = "; ".join(f"{rule.owner} needs {rule.describe()}" for rule in others)
    noun = "value that works is" if len(values) == 1 else "values that work are"
    raise BlockSizeError(
        f"mamba_block_size {wanted} is refused: it has to be a whole number of blocks, and the smallest block is "
        f"{least} ({said}); the nearest {noun} {' and '.join(map(str, values))}",
        option="mamba_block_size",
        value=wanted,
        expected=values,
    )


def kept_every(request: BlockSizeRequest, block_size: int, reasons: list[str]) -> int | None:
    """Tokens between kept states; the longest sequence where one is kept per request, ``None`` without states."""
    if not request.states:
        return None
    if request.mamba_cache_mode == "none":
        reasons.append(
            f"states: one per request, so that mamba_block_size is the longest sequence, {request.max_model_len}."
        )
        return request.max_model_len
    if request.mamba_block_size is not None:
        reasons.append(
            f"states: kept every {request.mamba_block_size} tokens as the user set, "
            f"{request.mamba_block_size // block_size} blocks of {block_size}."
        )
        return request.mamba_block_size
    if request.page_strategy == "subdivided":
        step = -(-max(1, request.state_tokens) // block_size) * block_size
        reasons.append(
            f"states: kept every {step} tokens, {step // block_size} blocks of {block_size}, whose K and V take as "
            "much memory as the states."
        )
        return step
    reasons.append(f"states: kept at every block boundary, each {block_size} tokens.")
    return block_size
