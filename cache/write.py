"""K and V into their slots, and back out again by the slow obvious way."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch

from ..errors import ConfigError, IntegrityError

PADDING_SLOT = -1
"""The slot of a token that is not written."""
TRITON_DEVICES = frozenset({"cuda", "xpu"})
"""Device types whose writes are one Triton kernel, where Triton is installed."""


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    scales: tuple[float, float] | None = None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Write T tokens into strided views of any layout, cast to the cache's dtype and clamped to its range.

    Tokens of slot -1 are skipped: nothing is written for them on the CPU and by the Triton kernel, which does all of
    this at once on CUDA and XPU. On other devices, or without Triton, to look for them would make the host wait:
    there they land in the first slot of the null block, which nobody reads.

    :param key: (T, Hk, D).
    :param value: (T, Hk, Dv).
    :param key_cache: strided view (num_blocks, block_size, Hk, D).
    :param value_cache: strided view (num_blocks, block_size, Hk, Dv).
    :param slot_mapping: (T,) int64; every slot but -1 at most once.
    :param scales: of K and V: what is stored is the number divided by its scale.
    :param rotary: cosine and sine, (T, R / 2) each: the first R numbers of every head of K turn, halves paired.
    :raises ConfigError: for shapes or dtypes that do not fit each other; integers are stored as they are.
    :raises IntegrityError: for a slot outside the cache, on the CPU. To look would make the host wait elsewhere: the
        Triton kernel skips every negative slot and writes to any other, so slots must come from the block table.
    """
    for name, rows, stored in (("key", key, key_cache), ("value", value, value_cache)):
        _check_shape(name, rows, stored, slot_mapping)
        _check_dtype(name, rows, stored, "scales" if scales else "rotary" if rotary and name == "key" else None)
    if rotary is not None:
        _check_rotary(key, *rotary)
    num_blocks, block_size = key_cache.shape[:2]
    slots = slot_mapping
    if slots.device.type in TRITON_DEVICES and _has_triton() and key.dtype.is_floating_point:
        from .write_triton import write_rows

        return write_rows(key, value, key_cache, value_cache, slots, scales=scales, rotary=rotary)
    if rotary is not None:
        key = rotate(key, *rotary)
    if scales is not None:
        key, value = key.float() / scales[0], value.float() / scales[1]
    if slots.device.type != "cpu":
        slots = slots.clamp(min=0)
    elif _has_padding(slots, num_blocks * block_size):
        kept = slots >= 0
        key, value, slots = key[kept], value[kept], slots[kept]
    return _scatter(key, value, key_cache, value_cache, slots)


def rotate(rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of the first R numbers of every head, the first half of them paired with the second.

    :param rows: (T, H, D).
    :param cos: (T, R / 2), as ``sin``.
    :return: (T, H, D) in the dtype of ``rows``; computed in float32.
    """
    half = cos.shape[-1]
    cos, sin = cos.float()[:, None], sin.float()[:, None]
    first, second, rest = rows.float().tensor_split((half, 2 * half), dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(rows.dtype)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def gather_kv(cache_view: torch.Tensor, block_ids: Sequence[int], length: int) -> torch.Tensor:
    """Copy a request's first ``length`` tokens out of K or V, block after block; reads no slot past them.

    :param cache_view: strided view (num_blocks, block_size, Hk, D).
    :return: (length, Hk, D), contiguous.
    :raises IntegrityError: if the blocks do not hold that many tokens.
    """
    block_size = cache_view.shape[1]
    if not 0 <= length <= len(block_ids) * block_size:
        raise IntegrityError(
            f"{length} tokens are asked of {len(block_ids)} blocks of {block_size}",
            value=length,
            expected=f"0 to {len(block_ids) * block_size}",
        )
    tokens = torch.empty((length, *cache_view.shape[2:]), dtype=cache_view.dtype, device=cache_view.device)
    for position, block_id in enumerate(block_ids):
        start, end = position * block_size, min((position + 1) * block_size, length)
        if start < end:
            tokens[start:end] = cache_view[block_id, : end - start]
    return tokens


def _scatter(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    block_size = key_cache.shape[1]
    caches = (key_cache, value_cache)
    index: tuple[torch.Tensor, ...]
    if all(cache.stride(0) == cache.stride(1) * block_size for cache in caches):
        # Blocks follow each other without a gap: a slot is a row, and no division is needed.
        index = (slots,)
        key_cache, value_cache = (cache.view(-1, *cache.shape[2:]) for cache in caches)
    else:
        index = (slots // block_size, slots % block_size)
    key_cache.index_put_(index, _cast(key, key_cache.dtype))
    value_cache.index_put_(index, _cast(value, value_cache.dtype))


def _cast(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if rows.dtype == dtype:
        return rows
    limits = torch.finfo(dtype)
    if limits.max >= torch.finfo(rows.dtype).max:  # no clamp needed, and torch refuses a limit that rows cannot hold
        return rows.to(dtype)
    # In float32: bfloat16 would round the end of float16 up, beyond what it holds.
    return rows.float().clamp(limits.min, limits.max).to(dtype)


def _check_shape(name: str, rows: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    expected = (*slots.shape, *cache.shape[2:])
    if rows.shape != expected or slots.dim() != 1:
        raise ConfigError(
            f"{name} has shape {tuple(rows.shape)}; {slots.numel()} slots of this cache take {expected}",
            option=name,
            value=tuple(rows.shape),
            expected=expected,
        )


def _check_dtype(name: str, rows: torch.Tensor, cache: torch.Tensor, arithmetic: str | None) -> None:
    """Numbers are cast, scaled and turned as floating-point numbers only.

    :param arithmetic: the option that asks for arithmetic on the rows.
    """
    if rows.dtype.is_floating_point and cache.dtype.is_floating_point:
        return
    if rows.dtype != cache.dtype:
        raise ConfigError(
            f"{name} is {rows.dtype} and its cache {cache.dtype}: write_kv casts between floating-point dtypes only, "
            f"with scales or without; quantise the rows to {cache.dtype}, or use a floating-point cache",
            option=name,
            value=str(rows.dtype),
            expected=str(cache.dtype),
        )
    if arithmetic is not None:
        raise ConfigError(
            f"{arithmetic} came with a {name} of {rows.dtype}, and integers are stored as they are; leave it out",
            option=arithmetic,
            value=str(rows.dtype),
            expected="floating-point rows",
        )


def _check_rotary(key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """The Triton kernel reads a cosine and a sine of every token, and never looks how many there are."""
    tokens, width = key.shape[0], key.shape[-1]
    if cos.shape != sin.shape or cos.dim() != 2 or len(cos) != tokens or not 0 < 2 * cos.shape[-1] <= width:
        raise ConfigError(
            f"rotary has shapes {tuple(cos.shape)} and {tuple(sin.shape)}; {tokens} tokens of head size {width} take "
            f"({tokens}, R / 2) each, with R from 2 to {width}",
            option="rotary",
            value=(tuple(cos.shape), tuple(sin.shape)),
            expected=(tokens, f"1 to {width // 2}"),
        )


def _has_padding(slots: torch.Tensor, count: int) -> bool:
    """Whether some slots are padding; refuses those outside the cache."""
    if slots.numel() == 0:
        return False
    low, high = (int(end) for end in torch.aminmax(slots))
    if low < PADDING_SLOT or high >= count:
        wrong = low if low < PADDING_SLOT else high
        raise IntegrityError(
            f"slot {wrong} is outside the cache, which has {count} slots",
            value=wrong,
            expected=f"-1 to {count - 1}",
        )
    return low < 0
