"""What the engine startup hook hands to an engine: every decision, and the objects that carry them out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from ..attention_backends.interface import AttentionBackend, BuildRequest, LayerRequest
from ..cache.layout import CacheLayout, Layout
from ..cache.specs import AttentionSpec, LayerGroup, LayerSpec
from ..cache.subdivided_layout import SubdividedLayout
from ..config import LAYOUTS, EngineConfig
from ..device import DeviceFacts, format_bytes
from ..errors import BackendError, CapacityError, ConfigError
from ..hybrid.mixers.backend import MixerBackend
from .address_range import shortest_reach
from .orders import common_order
from .plan import Plan
from .planning import with_num_blocks
from .stages import StagePlan

if TYPE_CHECKING:
    from ..attention_backends.interface import AttentionImpl
    from ..cache.allocation import KVCache
    from ..hybrid.mixers.interface import MixerKernels


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """Frozen: an engine reads it, and owns the cache's content."""

    config: EngineConfig
    device: DeviceFacts
    plan: Plan
    cache: KVCache
    """The allocated pool of pages, with one view per layer."""
    attention: Mapping[int, AttentionImpl]
    """Per attention layer (the model's layer index), the built backend; layers alike share one."""
    cleared_groups: frozenset[int]
    """Groups whose kernels touch unwritten slots: an engine clears their blocks at hand-out."""
    mixers: MixerKernels | None = None
    """Kernels of the state layers; ``None`` for a model that has none, or whose states mix by themselves."""
    notes: tuple[str, ...] = ()
    """What was decided after the plan (layout, allocation), and what plugins said of it."""

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        """Groups of layers, each with a block table of its own."""
        return self.plan.groups

    @property
    def block_size(self) -> int:
        """Tokens of a block of an attention group."""
        return self.plan.block_size

    @property
    def max_model_len(self) -> int:
        """Longest request that is served, prompt and output together, in tokens."""
        return self.plan.max_model_len

    def explain(self) -> str:
        """Platform, backend per layer, block size, pages, capacity, each with its reason."""
        return "\n".join([self.plan.explain(), "on the device:", *(f"  - {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, object]:
        """The plan's values, with those that are known only on the device."""
        layout = self.cache.layout
        return {
            **self.plan.to_dict(),
            "device": self.device.name,
            "layout": layout.order,
            "num_blocks": layout.num_blocks,
            "allocated_bytes": layout.total_bytes,
            "notes": list(self.notes),
        }


def make_ready(
    config: EngineConfig,
    plan: Plan,
    backends: Mapping[int, AttentionBackend],
    device: DeviceFacts,
    mixers: MixerBackend | None = None,
) -> Ready:
    """Carry out a plan on its device: allocate the cache, build the backends.

    :param backends: per attention layer the chosen backend.
    :param mixers: the chosen kernels of state layers.
    :raises CapacityError: if the memory is not known, or the device does not give it.
    :raises BackendError: if no layout suits every backend, or one cannot be built.
    """
    import torch

    from ..cache.allocation import allocate

    if plan.capacity is None:
        raise CapacityError(
            f"the memory of {device.name} is not known; give memory_bytes, device_memory_bytes or num_blocks",
            option="memory_bytes",
            value=None,
            expected="a size such as 8GiB",
        )
    several = plan.strategy.name == "subdivided" and plan.strategy.attention_group_width > 1
    order, why = choose_layout(config.cache.layout, backends, device, block_major=several)
    plan = _within_reach(config, plan, order, backends, device)
    assert plan.capacity is not None
    layout = layout_of(plan, order, plan.capacity.num_blocks)
    place = device.device_type if device.device_type == "cpu" else f"{device.device_type}:{device.index}"
    attention = _build(config, plan, layout, backends, device)
    cache = allocate(layout, torch.device(place))
    return Ready(
        config=config,
        device=device,
        plan=plan,
        cache=cache,
        attention=MappingProxyType(attention),
        cleared_groups=_cleared(plan.groups, backends, attention, device),
        mixers=None if mixers is None else mixers.build(device),
        notes=(why, f"cache: {layout.num_blocks} blocks, {format_bytes(layout.total_bytes)}, allocated on {place}."),
    )


def _within_reach(
    config: EngineConfig, plan: Plan, order: str, backends: Mapping[int, AttentionBackend], device: DeviceFacts
) -> Plan:
    """The plan with no more blocks than every kernel can address.

    :raises BackendError: if the user asked for more, naming what is in reach.
    """
    assert plan.capacity is not None
    wanted = plan.capacity.num_blocks
    capabilities = {layer: backend.capabilities(device) for layer, backend in backends.items()}
    reach = shortest_reach(layout_of(plan, order, wanted), capabilities)
    if reach is None or wanted <= reach.num_blocks:
        return plan
    if config.cache.num_blocks is not None or config.cache.memory_bytes is not None:
        option = "num_blocks" if config.cache.num_blocks is not None else "memory_bytes"
        raise BackendError(
            f"{option} asks for {wanted} blocks, and {reach.sentence()}; use fewer, or another backend",
            option=option,
            value=wanted,
            expected=f"<= {reach.num_blocks} blocks",
        )
    said = f"capacity: {reach.sentence()}, of the {wanted} that the memory holds."
    return with_num_blocks(plan, config, [reach.num_blocks], [said])


def layout_of(plan: Plan, order: str, num_blocks: int) -> Layout:
    """Where everything lies in a pool of ``num_blocks`` blocks; with pipeline stages, in the tightest one's.

    :param order: one of ``config.LAYOUTS``.
    :raises ConfigError: for an order in which these pages cannot lie.
    """
    return stage_layout(plan.stages[plan.tightest_stage], plan.block_size, order, num_blocks)


def stage_layout(stage: StagePlan, block_size: int, order: str, num_blocks: int) -> Layout:
    """Where everything of one pipeline stage lies, in a pool of ``num_blocks`` blocks of ``block_size`` tokens.

    :raises ConfigError: for an order in which these pages cannot lie, or a stage that stores nothing.
    """
    if stage.page_strategy == "subdivided":
        return SubdividedLayout(
            order=order, num_blocks=num_blocks, block_size=block_size, shape=stage.shape, groups=stage.groups
        )
    if stage.slots_per_block * stage.page_bytes != stage.shape.block_bytes:
        raise ConfigError(
            f"{stage.name} has layers of several page sizes in one block, as vLLM lays them out itself; page_strategy "
            "subdivided lays them out here",
            option="page_strategy",
            value=stage.page_strategy,
            expected="subdivided",
        )
    return CacheLayout(
        order=order,
        num_blocks=num_blocks,
        slots_per_block=stage.slots_per_block,
        page_size_bytes=stage.page_bytes,
        block_size=block_size,
        groups=stage.groups,
    )


def choose_layout(
    asked: str, backends: Mapping[int, AttentionBackend], device: DeviceFacts, *, block_major: bool = False
) -> tuple[str, str]:
    """The physical order of the pages, and why: as asked, or the first that every backend can read.

    :param block_major: only orders that keep a block's pages together: subdivided blocks of several layers.
    :raises BackendError: naming the backend that cannot read it, and what it can.
    """
    readable = {b.name: b.capabilities(device).layouts for b in dict.fromkeys(backends.values())}
    if asked != "auto":
        for name, orders in readable.items():
            if asked not in orders:
                raise BackendError(
                    f"layout {asked} cannot be read by backend {name}, which reads {', '.join(orders)}",
                    option="layout",
                    value=asked,
                    expected=list(orders),
                )
        return asked, f"layout: {asked}, as asked."
    order = common_order(list(readable.values()), block_major=block_major)
    if order is None:
        said = "; ".join(f"{name} reads {', '.join(orders)}" for name, orders in readable.items())
        raise BackendError(
            f"no layout suits every backend: {said}", option="layout", value="auto", expected=list(LAYOUTS)
        )
    return order, f"layout: {order}, the first that {' and '.join(readable) or 'every layer'} can read."


def _build(
    config: EngineConfig,
    plan: Plan,
    layout: Layout,
    backends: Mapping[int, AttentionBackend],
    device: DeviceFacts,
) -> dict[int, AttentionImpl]:
    """Equal layers share what is built, and with it what it compiles."""
    asks = {request.layer: request for request in plan.model.layer_requests()}
    built: dict[tuple[str, LayerRequest], AttentionImpl] = {}
    attention: dict[int, AttentionImpl] = {}
    for layer in _attention_layers(plan.groups):
        backend, spec = backends[layer.layer], layer.spec
        assert isinstance(spec, AttentionSpec)
        ask = replace(asks[layer.layer], layer=0)
        if (backend.name, ask) not in built:
            built[backend.name, ask] = backend.build(
                BuildRequest(
                    device=device,
                    spec=spec,
                    dtype=plan.model.dtype,
                    soft_cap=ask.soft_cap,
                    sinks=ask.sinks,
                    encoder_only=ask.encoder_only,
                    layout=layout.order,
                    block_size=plan.decision.block_size_of(spec),
                    kernel_block_size=plan.decision.kernel_block_sizes[backend.name],
                    num_blocks=layout.num_blocks,
                    max_num_seqs=config.scheduler.max_num_seqs,
                    max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
                    max_model_len=plan.max_model_len,
                    config=config.attention,
                )
            )
        attention[layer.layer] = built[backend.name, ask]
    return attention


def _attention_layers(groups: tuple[LayerGroup, ...]) -> list[LayerSpec]:
    return [layer for group in groups for layer in group.layers if not layer.is_state]


def _cleared(
    groups: tuple[LayerGroup, ...],
    backends: Mapping[int, AttentionBackend],
    attention: Mapping[int, AttentionImpl],
    device: DeviceFacts,
) -> frozenset[int]:
    """Groups in which a layer's kernels touch unwritten slots, by its backend's word or by what was built."""

    def reads(layer: int) -> bool:
        return backends[layer].capabilities(device).reads_unwritten_slots or attention[layer].reads_unwritten_slots

    return frozenset(
        group.index for group in groups if not group.is_state and any(reads(layer.layer) for layer in group.layers)
    )
