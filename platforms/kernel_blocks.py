"""Kernel blocks: what an attention backend's kernels ask of the KV block, and what they index inside it."""

from __future__ import annotations

from collections.abc import Iterable

from ..attention_backends.interface import Capabilities
from ..cache.block_size import (
    AnyMultipleOf,
    Constraint,
    MultipleOf,
    OneOf,
    check,
    checked,
    largest_accepted,
    smallest_accepted,
    solve,
)


def kernel_constraints(backends: Iterable[Capabilities]) -> tuple[Constraint, ...]:
    """What attention kernels ask of a block, once per backend."""
    rules: list[Constraint] = []
    for backend in backends:
        if backend.is_ssm:
            continue
        owner = backend.owner or backend.name
        if backend.exact_block_sizes:
            rules.append(OneOf(backend.exact_block_sizes, owner=owner))
        if backend.kernel_block_sizes:
            rules.append(AnyMultipleOf(backend.kernel_block_sizes, owner=owner))
        multiple, sizes = backend.kernel_block_multiple, backend.kernel_block_sizes
        implied = bool(sizes) and all(size % multiple == 0 for size in sizes)
        if multiple > 1 and not implied:
            rules.append(MultipleOf(backend.kernel_block_multiple, owner=owner))
    return checked(rules)


def preferred_block_size(backend: Capabilities, default: int) -> int:
    """The block that ``backend`` would choose by its rules alone: ``default``, or the next that it accepts."""
    rules = kernel_constraints([backend])
    size = smallest_accepted(rules, default)
    if size is None:
        size = largest_accepted(rules, default)
    if size is None:
        return solve(rules)
    return size


def smallest_kernel_block(backend: Capabilities) -> int:
    """The fewest tokens that the kernel indexes at a time."""
    return min(backend.exact_block_sizes or backend.kernel_block_sizes or (backend.kernel_block_multiple,))


def kernel_block_size(backend: Capabilities, block_size: int) -> int:
    """What the kernel indexes: its largest fixed size that divides the block, else the whole block.

    :raises BlockSizeError: if the backend cannot split ``block_size``.
    """
    check(block_size, kernel_constraints([backend]))
    if backend.exact_block_sizes or not backend.kernel_block_sizes:
        return block_size
    return max(size for size in backend.kernel_block_sizes if block_size % size == 0)
