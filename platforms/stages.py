"""Pipeline stages: what each one stores, in which pages, and what fits; one stage is the whole model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

from ..cache.capacity import Capacity, Holding, PoolShape
from ..cache.grouping import group_layers, slots_per_block
from ..cache.specs import AttentionSpec, LayerGroup, LayerSpec, MambaSpec
from ..cache.subdivision import Subdivision, subdivide, subdivided_groups
from ..errors import CapacityError
from ..hybrid.model_specs import ModelSpec
from ..hybrid.pipeline import stage_layers
from .decision import BlockSizeDecision


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """What one pipeline stage has, on each of its ranks. Its pool is its own; the block size is the model's."""

    index: int
    layers: tuple[int, ...]
    """Indices of the model's layers, those that store nothing included."""
    groups: tuple[LayerGroup, ...]
    """Empty if no layer of the stage stores anything."""
    page_strategy: str
    """``unified`` or ``subdivided``, as in every stage."""
    shape: PoolShape
    page_bytes: int
    """Bytes of one page: with unified pages the model's one page size, else that of the widest attention layer."""
    slots_per_block: int
    """Pages of one block; of the widest group."""
    state_bytes: int
    """What the states of one request need in this stage, in bytes, without any rounding."""
    capacity: Capacity | None = None
    """``None`` where no memory budget is known, or nothing is stored."""

    @property
    def name(self) -> str:
        """For sentences: ``stage 1 (layers 16-31)``."""
        return _name(self.index, self.layers)

    @property
    def pool_bytes_per_block(self) -> int:
        """Bytes that one block id takes; 0 where nothing is stored."""
        return self.shape.block_bytes if self.groups else 0

    @property
    def attention_group_width(self) -> int:
        """Layers of the widest attention group; 0 without attention."""
        return max((len(group.layers) for group in self.groups if not group.is_state), default=0)

    def id_bytes(self, group: LayerGroup) -> int:
        """A page of one layer; for states with pages of their own, what all states of a request take."""
        if self.page_strategy != "subdivided":
            return self.page_bytes
        spec = group.layers[0].spec
        if isinstance(spec, AttentionSpec):
            return spec.page_size_bytes(group.block_size)
        return self.shape.state_page_bytes

    def padding_bytes(self, group: LayerGroup) -> int:
        """Bytes of one block id of ``group`` that its layers never use: rounded-up pages and slots without a layer."""
        alone = group.is_state and self.page_strategy == "subdivided"
        taken = self.shape.state_page_bytes if alone else self.shape.block_bytes
        used = 0
        for layer in group.layers:
            spec = layer.spec
            used += spec.bytes_per_token * group.block_size if isinstance(spec, AttentionSpec) else spec.state_bytes
        return taken - used

    def group_dicts(self) -> list[dict[str, object]]:
        """The groups as JSON-ready values."""
        return [
            {
                "index": group.index,
                "kind": group.kind,
                "layers": [layer.layer for layer in group.layers],
                "block_size": group.block_size,
                "page_bytes": self.id_bytes(group),
                "padding_bytes": self.padding_bytes(group),
            }
            for group in self.groups
        ]

    def to_dict(self) -> dict[str, object]:
        """The stage as JSON-ready values."""
        return {
            "index": self.index,
            "layers": list(self.layers),
            "groups": self.group_dicts(),
            "page_bytes": self.page_bytes,
            "slots_per_block": self.slots_per_block,
            "pool_bytes_per_block": self.pool_bytes_per_block,
            "state_page_blocks": self.shape.state_page_blocks,
            "states_per_block": self.shape.states_per_block,
            "request_state_bytes": self.state_bytes,
            "request_state_page_bytes": self.shape.state_page_bytes if self.state_bytes else 0,
            "capacity": self.capacity.to_dict() if self.capacity else None,
        }


def unified_stages(
    model: ModelSpec, decision: BlockSizeDecision, count: int, state_block_size: int
) -> tuple[StagePlan, ...]:
    """Every stage with the model's one page size, also one that has only states or only attention."""
    found = []
    for index, (part, layers) in enumerate(_parts(model, count)):
        if decision.own_pages:
            found.append(_own_pages_stage(index, part, layers, decision))
            continue
        groups = group_layers(layers, decision.block_size, state_block_size, decision.block_sizes)
        slots = slots_per_block(groups)
        found.append(
            StagePlan(
                index=index,
                layers=part,
                groups=groups,
                page_strategy="unified",
                shape=PoolShape(block_bytes=max(1, slots * decision.page_bytes)),
                page_bytes=decision.page_bytes,
                slots_per_block=slots,
                state_bytes=state_bytes(layers),
            )
        )
    return tuple(found)


def _own_pages_stage(
    index: int, part: tuple[int, ...], layers: tuple[LayerSpec, ...], decision: BlockSizeDecision
) -> StagePlan:
    """All layers in one group, each with a page of its own size: a block is all of them."""
    pages = [x.spec.page_size_bytes(decision.block_size) for x in layers if isinstance(x.spec, AttentionSpec)]
    group = LayerGroup(index=0, kind=layers[0].kind, layers=layers, block_size=decision.block_size) if layers else None
    return StagePlan(
        index=index,
        layers=part,
        groups=(group,) if group else (),
        page_strategy="unified",
        shape=PoolShape(block_bytes=max(1, sum(pages))),
        page_bytes=max(pages, default=decision.page_bytes),
        slots_per_block=len(pages),
        state_bytes=0,
    )


def subdivided_stages(
    model: ModelSpec, decision: BlockSizeDecision, count: int, state_block_size: int, widest: int | None
) -> tuple[StagePlan, ...]:
    """Every stage with blocks as wide as suits its layers; one without attention has blocks of one state page.

    :param widest: layers that may share a block at most; ``None`` for any number.
    :raises CapacityError: if no block suits all kinds of attention layers of a stage.
    """
    found = []
    for index, (part, layers) in enumerate(_parts(model, count)):
        if layers:
            subdivision = _subdivide(index, part, count, layers, decision.block_size, widest)
            groups = subdivided_groups(layers, subdivision, decision.block_size, state_block_size)
            shape, slots = subdivision.shape, subdivision.width
        else:
            groups, shape, slots = (), PoolShape(block_bytes=1), 0
        attention = [layer.spec for layer in layers if isinstance(layer.spec, AttentionSpec)]
        found.append(
            StagePlan(
                index=index,
                layers=part,
                groups=groups,
                page_strategy="subdivided",
                shape=shape,
                page_bytes=max(
                    (spec.page_size_bytes(decision.block_size) for spec in set(attention)), default=shape.block_bytes
                ),
                slots_per_block=slots,
                state_bytes=state_bytes(layers),
            )
        )
    return tuple(found)


def state_bytes(layers: Sequence[LayerSpec]) -> int:
    """What the states of one request need, all layers, in bytes."""
    kinds = Counter(layer.spec for layer in layers if isinstance(layer.spec, MambaSpec))
    return sum(count * spec.state_bytes for spec, count in kinds.items() if isinstance(spec, MambaSpec))


def waste_of(stages: Sequence[StagePlan], holding: Holding, tokens: int) -> float:
    """Share of the memory of one request of ``tokens`` tokens, over all stages, that holds nothing."""
    taken = needed = 0
    for stage in stages:
        states, blocks = holding.request_need(stage.groups, tokens)
        taken += states * stage.shape.state_page_bytes + blocks * stage.shape.block_bytes
        for group in stage.groups:
            kept = holding.group_blocks(group, tokens) if group.is_state else holding.kept_tokens(group, tokens)
            for spec, count in Counter(layer.spec for layer in group.layers).items():
                size = spec.bytes_per_token if isinstance(spec, AttentionSpec) else spec.state_bytes
                needed += kept * count * size
    return 1 - needed / taken if taken else 0.0


def tightest(stages: Sequence[StagePlan], holding: Holding, max_model_len: int) -> StagePlan:
    """The stage that serves least: the shortest longest request, then the fewest at one time, longest first.

    Without capacities, the one in which a request of ``max_model_len`` tokens takes most. Stages that store nothing
    are never it, unless all do; the first of equals is.
    """
    storing = [stage for stage in stages if stage.groups] or list(stages[:1])

    def room(stage: StagePlan) -> tuple[int, ...]:
        needed = holding.request_bytes(stage.groups, stage.shape, max_model_len)
        if stage.capacity is None:
            return (-needed,)
        counts = sorted(stage.capacity.concurrency.items(), reverse=True)
        return (stage.capacity.max_tokens, *(count for _, count in counts), -needed)

    return min(storing, key=room)


def whole_capacity(stages: Sequence[StagePlan]) -> Capacity | None:
    """What all stages together serve: each number is that of the stage where it is tightest.

    A request is in every stage at once, so that blocks, lengths and requests are the minimum, and what a rank needs
    at least (its memory, the floor of a request) is the maximum.
    """
    known = [stage.capacity for stage in stages if stage.capacity is not None]
    if not known:
        return None
    return Capacity(
        memory_bytes=max(one.memory_bytes for one in known),
        num_blocks=min(one.num_blocks for one in known),
        max_tokens=min(one.max_tokens for one in known),
        floor_bytes_per_request=max(one.floor_bytes_per_request for one in known),
        concurrency=MappingProxyType(
            {length: min(one.concurrency[length] for one in known) for length in known[0].concurrency}
        ),
    )


def in_stage(error: CapacityError, stage: str) -> CapacityError:
    """The error, saying which stage it comes from."""
    return CapacityError(
        f"pipeline {stage}: {error.message}", option=error.option, value=error.value, expected=error.expected
    )


def _subdivide(
    index: int, part: tuple[int, ...], count: int, layers: tuple[LayerSpec, ...], block_size: int, widest: int | None
) -> Subdivision:
    try:
        return subdivide(layers, block_size, widest=widest)
    except CapacityError as error:
        if count == 1:
            raise
        raise in_stage(error, _name(index, part)) from None


def _name(index: int, layers: tuple[int, ...]) -> str:
    return f"stage {index} (layers {layers[0]}-{layers[-1]})"


def _parts(model: ModelSpec, count: int) -> list[tuple[tuple[int, ...], tuple[LayerSpec, ...]]]:
    """Per stage the indices of its layers, and what they store."""
    if count == 1:
        return [(tuple(range(model.num_layers)), model.layers)]
    return [
        (tuple(part), tuple(layer for layer in model.layers if layer.layer in part))
        for part in stage_layers(model.num_layers, count)
    ]
