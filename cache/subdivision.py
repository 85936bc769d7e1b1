"""Subdivided pages: how wide a block is, and how many blocks the states of one request take. No torch.

A block holds ``block_size`` tokens of a few attention layers, which stay as small as kernels like them. All states of
a request lie in one *state page*: a whole number of blocks, or, where states are small, an equal share of one block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from ..errors import CapacityError
from .block_size import divisors
from .capacity import PoolShape
from .specs import AttentionSpec, LayerGroup, LayerSpec, MambaSpec, dtype_bytes

STATE_ALIGNMENT = 16
"""Bytes: every state tensor starts at a multiple of this, from the start of its state page."""
REFERENCE_TOKENS = 512
"""Tokens of the request that padding is measured on: a short one, where it weighs most."""
NEGLIGIBLE_WASTE = 1 / 400
"""Share of a request's memory below which padding counts less than the number of block tables."""
LARGEST_EMPTY_SHARE = 1 / 8
"""Share of a block that may stay empty where layers of different widths share one pool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subdivision:
    """The geometry of a model's pool."""

    shape: PoolShape
    widths: Mapping[AttentionSpec, int]
    """Layers in one group, per kind of attention layer; empty without attention."""
    state_bytes: int
    """What the states of one request need, in bytes, without any rounding."""
    waste: float
    """Share of the memory of a :data:`REFERENCE_TOKENS` request that is padding."""

    @property
    def width(self) -> int:
        """Layers of the widest attention group; without attention a block is one page, a state page."""
        return max(self.widths.values(), default=1)


def subdivide(layers: Sequence[LayerSpec], block_size: int, *, widest: int | None = None) -> Subdivision:
    """Choose how many attention layers share a block, and what the states of a request take.

    The widest blocks, and so the fewest block tables, whose padding stays below :data:`NEGLIGIBLE_WASTE`; if there
    are none, those with the least. Without attention (a pipeline stage may have none) a block is a state page.

    :param block_size: tokens of one block.
    :param widest: layers that may share a block at most; ``None`` for any number.
    :raises CapacityError: if no block suits all kinds of attention layers, naming their pages.
    """
    counts: dict[AttentionSpec, int] = {}
    states: dict[MambaSpec, int] = {}
    for layer in layers:
        if isinstance(layer.spec, AttentionSpec):
            counts[layer.spec] = counts.get(layer.spec, 0) + 1
        else:
            states[layer.spec] = states.get(layer.spec, 0) + 1
    raw = sum(n * spec.state_bytes for spec, n in states.items())
    padded = sum(n * _aligned(tensor.size_bytes) for spec, n in states.items() for tensor in spec.states)
    element = max((dtype_bytes(tensor.dtype) for spec in states for tensor in spec.states), default=1)
    if not counts:
        return Subdivision(
            shape=PoolShape(block_bytes=padded), widths=MappingProxyType({}), state_bytes=raw, waste=1 - raw / padded
        )
    found = [
        _subdivision(counts, widths, raw, _shape(block_bytes, padded), block_size)
        for block_bytes, widths in _blocks(counts, block_size, widest)
        if block_bytes % element == 0
    ]
    if not found:
        raise _no_common_block(counts, block_size)
    good = [one for one in found if one.waste <= NEGLIGIBLE_WASTE]
    if good:
        return max(good, key=lambda one: one.shape.block_bytes)
    return min(found, key=lambda one: (one.waste, -one.shape.block_bytes))


def state_offsets(layers: Sequence[LayerSpec]) -> tuple[tuple[int, ...], ...]:
    """First byte of every state tensor, layer by layer, from the start of the state page; then its end."""
    offsets, end = [], 0
    for layer in layers:
        assert isinstance(layer.spec, MambaSpec)
        starts = []
        for state in layer.spec.states:
            starts.append(end)
            end = _aligned(end + state.size_bytes)
        offsets.append(tuple(starts))
    return (*offsets, (end,))


def subdivided_groups(
    layers: Sequence[LayerSpec], subdivision: Subdivision, block_size: int, state_block_size: int
) -> tuple[LayerGroup, ...]:
    """All state layers as one group, then groups of attention layers of equal specs; layers are dealt out in turn."""
    states = tuple(layer for layer in layers if layer.is_state)
    groups = []
    if states:
        groups.append(LayerGroup(index=0, kind=states[0].kind, layers=states, block_size=state_block_size))
    for spec, width in subdivision.widths.items():
        alike = [layer for layer in layers if layer.spec == spec]
        turns = -(-len(alike) // width)
        groups += [
            LayerGroup(
                index=len(groups) + turn, kind=alike[0].kind, layers=tuple(alike[turn::turns]), block_size=block_size
            )
            for turn in range(turns)
        ]
    return tuple(groups)


def _blocks(
    counts: Mapping[AttentionSpec, int], block_size: int, widest: int | None
) -> Iterator[tuple[int, dict[AttentionSpec, int]]]:
    """Bytes of every block that is a whole number of pages of each kind of attention layer, and layers per kind.

    Layers of one kind fill their groups evenly. Where kinds differ in their pages, the last group of a kind may have
    fewer layers, if that leaves no more empty than :data:`LARGEST_EMPTY_SHARE` of all blocks.
    """
    limit = widest or max(counts.values())
    pages = {spec: spec.page_size_bytes(block_size) for spec in counts}
    alike = len(set(pages.values())) == 1
    choices = {
        spec: sorted(w for w in (divisors(count) if alike else range(1, count + 1)) if w <= limit)
        for spec, count in counts.items()
    }
    filled = sum(count * pages[spec] for spec, count in counts.items())
    for block_bytes in sorted({w * pages[spec] for spec, widths in choices.items() for w in widths}):
        if any(block_bytes % page for page in pages.values()):
            continue
        fitting = {spec: max(w for w in choices[spec] if w * page <= block_bytes) for spec, page in pages.items()}
        tables = sum(-(-counts[spec] // w) for spec, w in fitting.items())
        if filled >= (1 - LARGEST_EMPTY_SHARE) * tables * block_bytes:
            yield block_bytes, fitting


def _subdivision(
    counts: Mapping[AttentionSpec, int],
    widths: Mapping[AttentionSpec, int],
    raw: int,
    shape: PoolShape,
    block_size: int,
) -> Subdivision:
    needed = raw + REFERENCE_TOKENS * sum(n * spec.bytes_per_token for spec, n in counts.items())
    tables = sum(-(-n // widths[spec]) for spec, n in counts.items())
    # Without the rounding of the last block, which is the same for every width.
    taken = shape.state_page_bytes + tables * shape.block_bytes * REFERENCE_TOKENS / block_size
    return Subdivision(
        shape=shape, widths=MappingProxyType(dict(widths)), state_bytes=raw, waste=(taken - needed) / taken
    )


def _shape(block_bytes: int, state_bytes: int) -> PoolShape:
    """Blocks per state, or states per block: an equal share of a block that starts at an aligned byte."""
    if not state_bytes:
        return PoolShape(block_bytes=block_bytes)
    if state_bytes >= block_bytes or block_bytes % STATE_ALIGNMENT:
        return PoolShape(block_bytes=block_bytes, state_page_blocks=-(-state_bytes // block_bytes))
    most = block_bytes // state_bytes
    share = next(n for n in range(most, 0, -1) if block_bytes % (n * STATE_ALIGNMENT) == 0)
    return PoolShape(block_bytes=block_bytes, states_per_block=share)


def _aligned(offset: int) -> int:
    return -(-offset // STATE_ALIGNMENT) * STATE_ALIGNMENT


def _no_common_block(counts: Mapping[AttentionSpec, int], block_size: int) -> CapacityError:
    pages = {spec.page_size_bytes(block_size) for spec in counts}
    said = " and ".join(f"{page} bytes" for page in sorted(pages))
    return CapacityError(
        f"page_strategy subdivided finds no block for attention pages of {said}: one block has to be a whole number of "
        f"each, and blocks may be empty by {LARGEST_EMPTY_SHARE:.1%} at most; page_strategy unified serves them",
        option="page_strategy",
        value="subdivided",
        expected="unified",
    )
