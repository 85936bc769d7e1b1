"""Which layers share block tables, and what one block id costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .specs import AttentionSpec, LayerGroup, LayerSpec, MambaSpec


def group_layers(
    layers: Sequence[LayerSpec],
    block_size: int,
    state_block_size: int,
    block_sizes: Mapping[AttentionSpec, int] | None = None,
) -> tuple[LayerGroup, ...]:
    """Split layers into groups of equal specs and about equal size.

    A block id belongs to one group and holds one page of each of its layers, so that the largest group sets what
    a block id costs. The group size is therefore the smallest bucket of equal specs, or the largest where it is
    less than one and a half times the smallest. Layers of a bucket are dealt out in turn.

    :param block_size: tokens of one block of an attention group.
    :param state_block_size: tokens between two kept states of a state group.
    :param block_sizes: tokens of one block of the kinds of attention layers that have others than ``block_size``.
    :return: state groups, then full attention, then sliding windows; empty if there are no layers.
    """
    buckets = _buckets(layers)
    if not buckets:
        return ()
    smallest, largest = min(map(len, buckets)), max(map(len, buckets))
    group_size = largest if 2 * largest < 3 * smallest else smallest
    groups: list[LayerGroup] = []
    for bucket in buckets:
        count = -(-len(bucket) // group_size)
        spec = bucket[0].spec
        tokens = state_block_size
        if isinstance(spec, AttentionSpec):
            tokens = (block_sizes or {}).get(spec, block_size)
        for turn in range(count):
            groups.append(
                LayerGroup(
                    index=len(groups),
                    kind=bucket[0].kind,
                    layers=tuple(bucket[turn::count]),
                    block_size=tokens,
                )
            )
    return tuple(groups)


def slots_per_block(groups: Sequence[LayerGroup]) -> int:
    """Pages that one block id holds: layers of the largest group."""
    return max((len(group.layers) for group in groups), default=0)


def pool_bytes_per_block(groups: Sequence[LayerGroup], page_bytes: int) -> int:
    """Bytes that one block id takes from the pool, whichever group gets it."""
    return slots_per_block(groups) * page_bytes


def _buckets(layers: Sequence[LayerSpec]) -> list[list[LayerSpec]]:
    """Layers of equal specs, in the order of the return value of :func:`group_layers`."""
    found: dict[AttentionSpec | MambaSpec, list[LayerSpec]] = {}
    for layer in layers:
        found.setdefault(layer.spec, []).append(layer)
    return sorted(found.values(), key=lambda bucket: _rank(bucket[0]))


def _rank(layer: LayerSpec) -> int:
    if layer.is_state:
        return 0
    return 2 if layer.kind == "sliding" else 1
