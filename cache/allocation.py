"""The buffer itself, and typed tensors on it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..device import format_bytes
from ..errors import CapacityError, ConfigError, IntegrityError
from .layout import NULL_BLOCK, Layout, StridedView
from .specs import DTYPE_BYTES, LayerSpec
from .staging import stage

_FP8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a plain dtype name.

    :raises ConfigError: for a name that is not in ``specs.DTYPE_BYTES``.
    """
    dtype = _FP8.get(name, getattr(torch, name, None)) if name in DTYPE_BYTES else None
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(
            f"dtype {name!r} has no torch dtype; known are {', '.join(DTYPE_BYTES)}",
            option="dtype",
            value=name,
            expected=list(DTYPE_BYTES),
        )
    return dtype


class KVCache:
    """All pages of all layers: one uint8 buffer, and strided tensors that share its memory.

    What was never written is not defined, with one exception: the null block starts as zeros.
    """

    def __init__(self, layout: Layout, buffer: torch.Tensor) -> None:
        self.layout = layout
        self.buffer = buffer
        self._key_value: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._states: dict[int, tuple[torch.Tensor, ...]] = {}
        self._pages = [self._widest_words(layout.group_pages(group.index)) for group in layout.groups]
        for layer in layout.layers():
            self._add_views(layer)

    def key_value(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K (num_blocks, block_size, Hk, D) and V (num_blocks, block_size, Hk, Dv) of the model's ``layer``.

        :raises ConfigError: if that layer stores no K and V here, or in a dtype whose pages also hold scales.
        """
        try:
            return self._key_value[layer]
        except KeyError:
            raise self._missing(layer, "K and V with a plain dtype", sorted(self._key_value)) from None

    def states(self, layer: int) -> tuple[torch.Tensor, ...]:
        """The state tensors of the model's ``layer`` in its spec's order: (num_blocks, ...) each.

        :raises ConfigError: if that layer keeps no state here.
        """
        try:
            return self._states[layer]
        except KeyError:
            raise self._missing(layer, "a state", sorted(self._states)) from None

    def pages(self) -> torch.Tensor:
        """Every block as bytes, whatever the order: uint8 (num_blocks, pages, bytes)."""
        view = self.layout.block_pages()
        return self.buffer.as_strided(view.shape, view.strides, view.offset_bytes)

    def clear_blocks(self, group: int, block_ids: Sequence[int]) -> None:
        """Zero what ``block_ids`` of ``group``'s block tables stand for; queued, the host does not wait.

        :raises IntegrityError: for a group or a block that this cache does not have; nothing is cleared then.
        """
        self._fill(group, block_ids, 0)

    def poison_blocks(self, group: int, block_ids: Sequence[int]) -> None:
        """The same with 0xFF, NaN in every float dtype: a debugging aid."""
        self._fill(group, block_ids, -1)

    def poison(self) -> None:
        """Fill the whole buffer, null block included, with 0xFF: NaN in every float dtype, for tests."""
        self.buffer.fill_(0xFF)

    def _add_views(self, layer: LayerSpec) -> None:
        layout = self.layout
        if layer.is_state:
            self._states[layer.layer] = tuple(self._tensor(view) for view in layout.state_views(layer))
        elif getattr(layer.spec, "dtype", None) in DTYPE_BYTES:
            key, value = layout.attention_view(layer)
            self._key_value[layer.layer] = self._tensor(key), self._tensor(value)

    def _tensor(self, view: StridedView) -> torch.Tensor:
        return self.buffer.view(torch_dtype(view.dtype)).as_strided(view.shape, view.strides, view.offset)

    def _fill(self, group: int, block_ids: Sequence[int], word: int) -> None:
        if not 0 <= group < len(self._pages):
            raise IntegrityError(
                f"group {group} is not one of the cache's {len(self._pages)} groups",
                value=group,
                expected=f"0 to {len(self._pages) - 1}",
            )
        pages = self._pages[group]
        for block_id in block_ids:
            if not 0 <= block_id < len(pages):
                raise IntegrityError(
                    f"block {block_id} cannot be cleared: the cache has {len(pages)} blocks",
                    value=block_id,
                    expected=f"0 to {len(pages) - 1}",
                )
        if block_ids:
            word = word if pages.dtype.is_signed else word % 256
            pages.index_fill_(0, stage(block_ids, torch.int64, self.buffer.device), word)

    def _widest_words(self, view: StridedView) -> torch.Tensor:
        """Bytes as the widest words that they are a whole number of: fewer of them to fill."""
        parts = (view.offset_bytes, *view.strides[:2], view.shape[2], self.buffer.numel())
        word = next(word for word in _WORDS if all(part % word.itemsize == 0 for part in parts))
        size = word.itemsize
        shape, strides = (*view.shape[:2], view.shape[2] // size), (*(s // size for s in view.strides[:2]), 1)
        return self.buffer.view(word).as_strided(shape, strides, view.offset_bytes // size)

    def _missing(self, layer: int, what: str, there: list[int]) -> ConfigError:
        return ConfigError(
            f"layer {layer} stores no {what.removeprefix('a ')} in this cache; layers that do: {there}",
            option="layer",
            value=layer,
            expected=there,
        )


def allocate(layout: Layout, device: torch.device) -> KVCache:
    """The cache on ``device``: ``layout.total_bytes`` bytes of it, with only the null block cleared.

    :raises CapacityError: when the device does not have that much memory.
    """
    try:
        buffer = torch.empty(layout.total_bytes, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        size, reason = format_bytes(layout.total_bytes), str(error).partition("\n")[0]
        raise CapacityError(
            f"{layout.num_blocks} blocks need {size} on {device}, which refused: {reason}",
            option="num_blocks",
            value=layout.num_blocks,
            expected="fewer blocks, or more memory",
        ) from error
    cache = KVCache(layout, buffer)
    cache.pages()[NULL_BLOCK].zero_()
    return cache
