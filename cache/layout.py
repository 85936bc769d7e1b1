"""Where every number of the cache lies: one buffer cut into blocks, slots and pages. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Protocol

from ..config import LAYOUTS
from ..errors import ConfigError
from .capacity import PoolShape
from .specs import DTYPE_BYTES, AttentionSpec, LayerGroup, LayerSpec, MambaSpec, dtype_bytes

NULL_BLOCK = 0
"""The block that nobody owns: padding entries of block tables point there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StridedView:
    """A typed window on the cache's buffer, to be made with ``as_strided`` on ``buffer.view(dtype)``."""

    offset_bytes: int
    """First byte, from the start of the buffer; a multiple of the element size."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Per axis, in elements."""
    dtype: str

    @property
    def offset(self) -> int:
        """First element, from the start of the buffer."""
        return self.offset_bytes // dtype_bytes(self.dtype)

    @property
    def span(self) -> int:
        """Elements from the first to the last that the view reaches: what a kernel must address."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))

    @property
    def end_bytes(self) -> int:
        """The byte after the last one that the view reaches."""
        return self.offset_bytes + self.span * dtype_bytes(self.dtype)


class Layout(Protocol):
    """Where a cache's numbers lie, whatever the page strategy: what allocation, pools and engines ask."""

    @property
    def order(self) -> str:
        """One of ``config.LAYOUTS``."""

    @property
    def num_blocks(self) -> int:
        """Blocks in the buffer, the null block included."""

    @property
    def block_size(self) -> int:
        """Tokens of one block of attention, where a group says no other."""

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        """Group ``i`` has index ``i``."""

    @property
    def shape(self) -> PoolShape:
        """How states and attention share the pool."""

    @property
    def total_bytes(self) -> int:
        """Bytes of the buffer."""

    def layers(self) -> Iterator[LayerSpec]:
        """Every layer, group after group."""

    def attention_view(self, layer: LayerSpec) -> tuple[StridedView, StridedView]:
        """K (num_blocks, block_size, Hk, D) and V (num_blocks, block_size, Hk, Dv) of an attention layer."""

    def state_views(self, layer: LayerSpec) -> tuple[StridedView, ...]:
        """State tensors of a state layer, (ids, ...) each."""

    def block_pages(self) -> StridedView:
        """Every block of the pool: uint8 (num_blocks, pages, bytes)."""

    def group_pages(self, group: int) -> StridedView:
        """What the ids in the block tables of ``group`` stand for: uint8 (ids, pages, bytes)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLayout:
    """One buffer of ``num_blocks * slots_per_block`` pages, and the order that they and their tokens lie in.

    A block belongs to one group at a time and holds one page of each of its layers: the layer at position
    ``j`` of the group has slot ``j``. ``NHD`` and ``HND`` lie slot by slot, so that one layer's pages touch;
    the ``cross_layer_`` orders lie block by block, so that a block is one run of bytes. See docs/cache.md.

    :raises ConfigError: when the pieces do not fit each other; the message names the layer and both numbers.
    """

    order: str
    """One of ``config.LAYOUTS``."""
    num_blocks: int
    """Blocks in the buffer, the null block included."""
    slots_per_block: int
    """Pages in one block; the largest group's number of layers, or more."""
    page_size_bytes: int
    """Bytes of every page. A layer that needs less leaves the end of its pages unused."""
    block_size: int
    """Tokens of one block of attention, of most groups; a group may say another, as long as it fits the page."""
    groups: tuple[LayerGroup, ...]
    """Group ``i`` has index ``i``."""

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check_groups(self)
        for layer in self.layers():
            _check_layer(self, layer)

    @property
    def is_block_major(self) -> bool:
        """True if all pages of a block are one run of bytes (the ``cross_layer_`` orders)."""
        return self.order.startswith("cross_layer_")

    @property
    def heads_before_tokens(self) -> bool:
        """True if, inside a page, heads come before tokens (the ``HND`` orders)."""
        return self.order.endswith("HND")

    @property
    def block_stride_bytes(self) -> int:
        """Bytes from a layer's page in one block to its page in the next block."""
        return self.page_size_bytes * (self.slots_per_block if self.is_block_major else 1)

    @property
    def slot_stride_bytes(self) -> int:
        """Bytes from one page of a block to the next page of the same block."""
        return self.page_size_bytes * (1 if self.is_block_major else self.num_blocks)

    @property
    def block_bytes(self) -> int:
        """Bytes that one block takes."""
        return self.slots_per_block * self.page_size_bytes

    @property
    def shape(self) -> PoolShape:
        """A state takes a block, as attention does."""
        return PoolShape(block_bytes=self.block_bytes)

    @property
    def total_bytes(self) -> int:
        """Bytes of the buffer."""
        return self.num_blocks * self.block_bytes

    def layers(self) -> Iterator[LayerSpec]:
        """Every layer, group after group."""
        for group in self.groups:
            yield from group.layers

    def place(self, layer: LayerSpec) -> tuple[LayerGroup, int]:
        """The group of ``layer``, and its slot in the group's blocks.

        :raises ConfigError: for a layer that is in no group.
        """
        for group in self.groups:
            if layer in group.layers:
                return group, group.layers.index(layer)
        raise _refuse("layer", layer.layer, f"{_name(layer)} is in no group of this cache", "a layer of it")

    def page_offset(self, block_id: int, slot: int) -> int:
        """First byte of the page of ``slot`` in ``block_id``."""
        return block_id * self.block_stride_bytes + slot * self.slot_stride_bytes

    def used_bytes(self, layer: LayerSpec) -> int:
        """Bytes that ``layer`` needs of each of its pages; the rest is padding."""
        spec = layer.spec
        if isinstance(spec, MambaSpec):
            return spec.state_bytes
        group, _ = self.place(layer)
        return spec.page_size_bytes(group.block_size)

    def page_view(self, layer: LayerSpec) -> StridedView:
        """The pages of ``layer`` as bytes: uint8 (num_blocks, page_size_bytes).

        :raises ConfigError: for a layer that is in no group.
        """
        _, slot = self.place(layer)
        return StridedView(
            offset_bytes=self.page_offset(0, slot),
            shape=(self.num_blocks, self.page_size_bytes),
            strides=(self.block_stride_bytes, 1),
            dtype="uint8",
        )

    def attention_view(self, layer: LayerSpec) -> tuple[StridedView, StridedView]:
        """K (num_blocks, block_size, Hk, D) and V (num_blocks, block_size, Hk, Dv) of an attention layer.

        The last axis is contiguous in every order. In NHD a token's K heads and V heads are one row; in HND
        all of K comes before all of V, head after head, with one token every ``head_size`` elements.

        :raises ConfigError: for a state layer, a layer in no group, or a dtype whose pages also hold scales.
        """
        group, slot = self.place(layer)
        return key_value_views(
            layer,
            offset_bytes=self.page_offset(0, slot),
            num_blocks=self.num_blocks,
            block_size=group.block_size,
            block_stride_bytes=self.block_stride_bytes,
            heads_before_tokens=self.heads_before_tokens,
        )

    def state_views(self, layer: LayerSpec) -> tuple[StridedView, ...]:
        """State tensors of a state layer: (num_blocks, ...) each, one after the other inside the page.

        :raises ConfigError: for an attention layer, or a layer that is in no group.
        """
        states = states_of(layer)
        _, slot = self.place(layer)
        offsets = _state_offsets(states)[:-1]
        return strided_states(
            states, [self.page_offset(0, slot) + first for first in offsets], self.num_blocks, self.block_stride_bytes
        )

    def block_pages(self) -> StridedView:
        """Every page of every block: uint8 (num_blocks, slots_per_block, page_size_bytes)."""
        return self._pages(self.slots_per_block)

    def group_pages(self, group: int) -> StridedView:
        """The pages of ``group``'s layers: uint8 (num_blocks, layers of the group, page_size_bytes)."""
        return self._pages(len(self.groups[group].layers))

    def _pages(self, slots: int) -> StridedView:
        return StridedView(
            offset_bytes=0,
            shape=(self.num_blocks, slots, self.page_size_bytes),
            strides=(self.block_stride_bytes, self.slot_stride_bytes, 1),
            dtype="uint8",
        )


def key_value_views(
    layer: LayerSpec,
    *,
    offset_bytes: int,
    num_blocks: int,
    block_size: int,
    block_stride_bytes: int,
    heads_before_tokens: bool,
) -> tuple[StridedView, StridedView]:
    """K and V of an attention layer whose page in block ``b`` starts at ``offset_bytes + b * block_stride_bytes``.

    :raises ConfigError: for a state layer, or a dtype whose pages also hold scales.
    """
    spec = layer.spec
    if isinstance(spec, MambaSpec):
        message = f"{_name(layer)} keeps a state, not K and V"
        raise _refuse("layer", layer.layer, message, "an attention layer")
    if spec.dtype not in DTYPE_BYTES:
        message = f"{_name(layer)} stores {spec.dtype}, whose pages also hold scales: no plain K and V"
        raise _refuse("kv_cache_dtype", spec.dtype, message, list(DTYPE_BYTES))
    size, heads, dtype = dtype_bytes(spec.dtype), spec.num_kv_heads, spec.dtype

    def view(width: int, first: int) -> StridedView:
        row = heads * (spec.head_size + spec.head_size_v)
        inner = (width, block_size * width, 1) if heads_before_tokens else (row, width, 1)
        return StridedView(
            offset_bytes=offset_bytes + first * size,
            shape=(num_blocks, block_size, heads, width),
            strides=(block_stride_bytes // size, *inner),
            dtype=dtype,
        )

    before_value = heads * spec.head_size * (block_size if heads_before_tokens else 1)
    return view(spec.head_size, 0), view(spec.head_size_v, before_value)


def states_of(layer: LayerSpec) -> MambaSpec:
    """What a state layer keeps.

    :raises ConfigError: for an attention layer.
    """
    if isinstance(layer.spec, AttentionSpec):
        message = f"{_name(layer)} keeps K and V, not a state"
        raise _refuse("layer", layer.layer, message, "a state layer")
    return layer.spec


def strided_states(spec: MambaSpec, offsets: Sequence[int], count: int, stride_bytes: int) -> tuple[StridedView, ...]:
    """State tensors of ``spec``, (count, ...) each; tensor ``i`` of state ``s`` at ``offsets[i] + s * stride_bytes``.

    All in bytes, from the start of the buffer.
    """
    return tuple(
        StridedView(
            offset_bytes=first,
            shape=(count, *state.shape),
            strides=(stride_bytes // dtype_bytes(state.dtype), *_contiguous(state.shape)),
            dtype=state.dtype,
        )
        for state, first in zip(spec.states, offsets, strict=True)
    )


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _state_offsets(spec: MambaSpec) -> tuple[int, ...]:
    """First byte of each state tensor in the page, and of what follows the last."""
    return tuple(accumulate((state.size_bytes for state in spec.states), initial=0))


def _name(layer: LayerSpec) -> str:
    return f"layer {layer.layer} ({layer.kind})"


def _refuse(option: str, value: object, message: str, expected: object) -> ConfigError:
    return ConfigError(message, option=option, value=value, expected=expected)


def _check_numbers(layout: CacheLayout) -> None:
    if layout.order not in LAYOUTS:
        message = f"layout {layout.order!r} is not known; choose from {', '.join(LAYOUTS)}"
        raise _refuse("layout", layout.order, message, list(LAYOUTS))
    least = {"num_blocks": 2, "slots_per_block": 1, "page_size_bytes": 1, "block_size": 1}
    for option, smallest in least.items():
        value = getattr(layout, option)
        if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
            why = " (block 0 is the null block, which holds no tokens)" if option == "num_blocks" else ""
            message = f"{option} {value!r} must be a whole number of at least {smallest}{why}"
            raise _refuse(option, value, message, f">= {smallest}")


def _check_groups(layout: CacheLayout) -> None:
    if not layout.groups:
        raise _refuse("groups", (), "a cache needs at least one group of layers", "at least one group")
    seen: set[tuple[int, bool]] = set()
    for position, group in enumerate(layout.groups):
        if group.index != position:
            message = f"group {group.index} stands at position {position}; groups count up from 0"
            raise _refuse("groups", group.index, message, position)
        if not 0 < len(group.layers) <= layout.slots_per_block:
            slots, count = layout.slots_per_block, len(group.layers)
            message = f"group {position} has {count} layers for {slots} slots_per_block"
            raise _refuse("slots_per_block", slots, message, f"1 to {slots} layers in a group")
        for layer in group.layers:
            if layer.is_state != group.is_state:
                message = f"group {position} mixes {_name(group.layers[0])} with {_name(layer)}"
                raise _refuse("groups", layer.layer, message, "attention or states in a group, not both")
            if (layer.layer, layer.is_state) in seen:
                message = f"{_name(layer)} is in the cache twice"
                raise _refuse("groups", layer.layer, message, "each layer's K and V, and its state, once")
            seen.add((layer.layer, layer.is_state))


def _check_layer(layout: CacheLayout, layer: LayerSpec) -> None:
    """A page holds what the layer needs, and every offset and stride is whole elements."""
    page, used = layout.page_size_bytes, layout.used_bytes(layer)
    if used > page:
        message = f"{_name(layer)} needs {used} bytes of each page, and page_size_bytes is {page}"
        raise _refuse("page_size_bytes", page, message, f">= {used}")
    parts = (
        [("K and V", layer.spec.dtype)]
        if isinstance(layer.spec, AttentionSpec)
        else [(state.name, state.dtype) for state in layer.spec.states]
    )
    starts = (0,) if isinstance(layer.spec, AttentionSpec) else _state_offsets(layer.spec)
    for (part, dtype), first in zip(parts, starts, strict=False):
        size = DTYPE_BYTES.get(dtype, 1)
        if page % size:
            message = f"page_size_bytes {page} is not a multiple of {size}: {_name(layer)} stores {dtype}"
            raise _refuse("page_size_bytes", page, message, f"a multiple of {size}")
        if first % size:
            message = f"the {part} state of {_name(layer)} is {dtype} and starts at byte {first} of its page"
            raise _refuse("layer", layer.layer, f"{message}, no multiple of {size}", f"a multiple of {size}")
