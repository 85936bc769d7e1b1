"""Where every number lies when pages are subdivided: narrow blocks, and states over whole runs of them. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..config import LAYOUTS
from ..errors import ConfigError
from .capacity import PoolShape
from .layout import StridedView, key_value_views, states_of, strided_states
from .specs import AttentionSpec, LayerGroup, LayerSpec
from .subdivision import state_offsets


@dataclass(frozen=True, slots=True, kw_only=True)
class SubdividedLayout:
    """One buffer of ``num_blocks`` blocks, block after block.

    A block of an attention group holds one page of each of its layers, side by side. The state group's ids count
    state pages: all states of a request, layer after layer, over ``state_page_blocks`` blocks in a row, or in one of
    ``states_per_block`` shares of a block. What is left of the last, incomplete state page serves attention.

    :raises ConfigError: when the pieces do not fit each other; the message names them.
    """

    order: str
    """One of ``config.LAYOUTS``; those that are not block-major only where a group is one layer."""
    num_blocks: int
    """Blocks in the buffer, the null block included."""
    block_size: int
    """Tokens of one block of every attention group."""
    shape: PoolShape
    groups: tuple[LayerGroup, ...]
    """Group ``i`` has index ``i``; one of them has all states, if there are states."""

    def __post_init__(self) -> None:
        if self.order not in LAYOUTS:
            raise _refuse("layout", self.order, f"layout {self.order!r} is not known", list(LAYOUTS))
        if self.num_blocks < 2:
            message = f"num_blocks {self.num_blocks} leaves nothing beside block 0, the null block"
            raise _refuse("num_blocks", self.num_blocks, message, ">= 2")
        if [group.is_state for group in self.groups].count(True) > 1 or not self.groups:
            message = f"subdivided pages keep all states in one group; here are {len(self.groups)} groups"
            raise _refuse("groups", len(self.groups), message, "one group with every state, groups of attention")
        for position, group in enumerate(self.groups):
            self._check_group(position, group)

    @property
    def total_bytes(self) -> int:
        """Bytes of the buffer."""
        return self.num_blocks * self.shape.block_bytes

    @property
    def num_states(self) -> int:
        """Ids of the state group; the first :attr:`PoolShape.states_per_block` belong to the null block."""
        return self.shape.num_state_pages(self.num_blocks) * self.shape.states_per_block

    @property
    def heads_before_tokens(self) -> bool:
        """True if, inside a page, heads come before tokens (the ``HND`` orders)."""
        return self.order.endswith("HND")

    def layers(self) -> Iterator[LayerSpec]:
        """Every layer, group after group."""
        for group in self.groups:
            yield from group.layers

    def attention_view(self, layer: LayerSpec) -> tuple[StridedView, StridedView]:
        """K (num_blocks, block_size, Hk, D) and V (num_blocks, block_size, Hk, Dv) of an attention layer.

        :raises ConfigError: for a state layer, a layer in no group, or a dtype whose pages also hold scales.
        """
        group, position = self._place(layer)
        return key_value_views(
            layer,
            offset_bytes=position * _page_bytes(group, self.block_size),
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            block_stride_bytes=self.shape.block_bytes,
            heads_before_tokens=self.heads_before_tokens,
        )

    def state_views(self, layer: LayerSpec) -> tuple[StridedView, ...]:
        """State tensors of a state layer: (num_states, ...) each.

        :raises ConfigError: for an attention layer, or a layer that is in no group.
        """
        states = states_of(layer)
        group, position = self._place(layer)
        offsets = state_offsets(group.layers)[position]
        return strided_states(states, offsets, self.num_states, self.shape.state_page_bytes)

    def block_pages(self) -> StridedView:
        """Every block: uint8 (num_blocks, 1, bytes of a block)."""
        size = self.shape.block_bytes
        return _bytes_view(self.num_blocks, 1, size, size)

    def group_pages(self, group: int) -> StridedView:
        """What the ids of ``group`` stand for: uint8 (num_blocks, layers, page), or (num_states, 1, state page)."""
        found = self.groups[group]
        if found.is_state:
            size = self.shape.state_page_bytes
            return _bytes_view(self.num_states, 1, size, size)
        page = _page_bytes(found, self.block_size)
        return _bytes_view(self.num_blocks, len(found.layers), page, self.shape.block_bytes)

    def _place(self, layer: LayerSpec) -> tuple[LayerGroup, int]:
        for group in self.groups:
            if layer in group.layers:
                return group, group.layers.index(layer)
        message = f"layer {layer.layer} ({layer.kind}) is in no group of this cache"
        raise _refuse("layer", layer.layer, message, "a layer of it")

    def _check_group(self, position: int, group: LayerGroup) -> None:
        if group.index != position or not group.layers:
            message = f"group {group.index} with {len(group.layers)} layers stands at position {position}"
            raise _refuse("groups", group.index, message, "groups that count up from 0, each with a layer")
        if group.is_state:
            used, room, what = state_offsets(group.layers)[-1][0], self.shape.state_page_bytes, "state page"
        else:
            used, room, what = len(group.layers) * _page_bytes(group, self.block_size), self.shape.block_bytes, "block"
            if not self.order.startswith("cross_layer_") and used != _page_bytes(group, self.block_size):
                message = f"layout {self.order} keeps a layer's pages together, and group {position} has"
                raise _refuse("layout", self.order, f"{message} {len(group.layers)} layers in a block", "one layer")
        if used > room:
            message = f"group {position} needs {used} bytes of each {what}, which has {room}"
            raise _refuse("groups", used, message, f"<= {room}")


def _page_bytes(group: LayerGroup, block_size: int) -> int:
    spec = group.layers[0].spec
    assert isinstance(spec, AttentionSpec)
    return spec.page_size_bytes(block_size)


def _bytes_view(count: int, pages: int, page: int, stride: int) -> StridedView:
    return StridedView(offset_bytes=0, shape=(count, pages, page), strides=(stride, page, 1), dtype="uint8")


def _refuse(option: str, value: object, message: str, expected: object) -> ConfigError:
    return ConfigError(message, option=option, value=value, expected=expected)
