"""A layer's cache as flex wants it: one long axis of tokens, without a copy, whatever the physical order."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...errors import BackendError


@dataclass(frozen=True, slots=True)
class FlatCache:
    """K and V as (1, Hk, tokens, D): ``block_id * block_stride + offset`` is a token's place.

    Where pages of other layers, or K and V apart, lie between two blocks of this layer, ``block_stride`` is
    larger than the block; what lies between is inside the view but in no block, so nothing reads it.
    """

    key: torch.Tensor
    value: torch.Tensor
    block_stride: int
    """Tokens from one block's start to the next one's."""
    num_blocks: int
    block_size: int
    wide: bool = False
    """True if the views are longer than 32 bits can address, so that only TMA (which counts tokens) may read them."""


INT32_ELEMENTS = 2**31 - 1


def flatten(
    key_cache: torch.Tensor, value_cache: torch.Tensor, kernel_block: int, max_elements: int | None
) -> FlatCache:
    """The flat view of (num_blocks, block_size, Hk, D) strided views.

    :param kernel_block: tokens of a kernel block; it must divide the distance between blocks.
    :param max_elements: elements that the kernel can address, or ``None``.
    :raises BackendError: when the strides allow no such view, or it is longer than ``max_elements``.
    """
    num_blocks, block_size = key_cache.shape[:2]
    strides = [_block_stride(cache, name) for name, cache in (("K", key_cache), ("V", value_cache))]
    if strides[0] != strides[1]:
        raise BackendError(
            f"K's blocks are {strides[0]} tokens apart and V's {strides[1]}; flex reads both at the same "
            f"place (head sizes {key_cache.shape[-1]} and {value_cache.shape[-1]})",
            option="layout",
        )
    if strides[0] % kernel_block:
        raise BackendError(
            f"blocks of this layer are {strides[0]} tokens apart, which kernel blocks of {kernel_block} do not divide",
            option="layout",
        )
    tokens = (num_blocks - 1) * strides[0] + block_size
    if tokens > INT32_ELEMENTS:
        raise BackendError(
            f"the view of this layer spans {tokens} tokens, and flex addresses {INT32_ELEMENTS}",
            option="num_blocks",
            value=num_blocks,
        )
    wide = max(tokens * cache.stride(1) for cache in (key_cache, value_cache)) > INT32_ELEMENTS
    if wide and key_cache.device.type == "cuda":
        _check_aligned(key_cache)
        _check_aligned(value_cache)
    return FlatCache(
        _flat(key_cache, tokens, max_elements),
        _flat(value_cache, tokens, max_elements),
        strides[0],
        num_blocks,
        block_size,
        wide,
    )


def _block_stride(cache: torch.Tensor, name: str) -> int:
    block, token, _, last = cache.stride()
    if last != 1 or block % token:
        raise BackendError(
            f"{name}'s strides {tuple(cache.stride())} are no flat run of tokens: the last must be 1, "
            f"and the block's {block} a multiple of the token's {token}",
            option="layout",
        )
    return block // token


def _check_aligned(cache: torch.Tensor) -> None:
    """What TMA needs; without it torch would address elements with 32 bits, which wrap."""
    numbers = (cache.data_ptr(), *(stride * cache.element_size() for stride in cache.stride()[:3]))
    if any(number % 16 for number in numbers):
        raise BackendError(
            f"a view beyond {INT32_ELEMENTS} elements must start and step at multiples of 16 bytes, and this one has "
            f"{numbers}",
            option="num_blocks",
            value=cache.shape[0],
        )


def _flat(cache: torch.Tensor, tokens: int, max_elements: int | None) -> torch.Tensor:
    _, token, head, _ = cache.stride()
    _, _, num_heads, size = cache.shape
    span = (tokens - 1) * token + (num_heads - 1) * head + size
    if max_elements is not None and span > max_elements:
        raise BackendError(
            f"the view of this layer spans {span} elements, and flex on {cache.device.type} addresses {max_elements}",
            option="num_blocks",
            value=cache.shape[0],
        )
    return cache.as_strided((1, num_heads, tokens, size), (0, head, token, 1))
