"""IPEX's kernels over makeready's pages: decode rows by the single-query kernel, all others by the varlen kernel."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any

import torch
from torch.nn.functional import pad

from ...cache.specs import AttentionSpec
from ...errors import BackendError
from ..interface import AttentionCall, AttentionImpl
from ..metadata import StepMetadata
from .ipex_parts import Part, as_blocks, decode_view, gathered_part, part_of

PARTITION = 128
"""Keys that the decode kernel takes at a time. It walks whole kernel blocks inside: they must divide it, or it
writes past its buffer (wrong results, then a crash; seen with 48, 256 and 528 as soon as 128 keys are passed)."""
SMALLEST_KERNEL_BLOCK = 8
"""Below this, block tables get long and the varlen kernel is the better one."""
LARGEST_GROUP = 16
"""Query heads per KV head for which the decode kernel's buffer is made."""


class IpexAttention(AttentionImpl):
    """One built instance serves every layer with the same :class:`AttentionSpec`.

    :param kernels: IPEX's ``PagedAttention``.
    """

    name = "flash"

    def __init__(self, kernels: Any, spec: AttentionSpec) -> None:
        self._kernels = kernels
        group = spec.num_query_heads // spec.num_kv_heads
        self._group_fits = group <= LARGEST_GROUP
        self._head_mapping = torch.arange(spec.num_kv_heads, dtype=torch.int32).repeat_interleave(group)

    def prepare(self, step: StepMetadata) -> tuple[Part, ...]:
        """The step's requests in at most two parts: one query each, and the others."""
        lens = step.query_lens_host
        single = [index for index, count in enumerate(lens) if count == 1]
        several = [index for index, count in enumerate(lens) if count > 1]
        return tuple(part_of(step, requests) for requests in (single, several) if requests)

    def forward(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        metadata: tuple[Part, ...],
        call: AttentionCall,
    ) -> torch.Tensor:
        """Attention over HND pages; shapes as in :class:`AttentionImpl`.

        :raises BackendError: for pages in another order, another dtype, sinks, or a window of 1.
        """
        _check_call(call)
        _check_pages(query, key_cache, value_cache)
        key, value = key_cache.transpose(1, 2), value_cache.transpose(1, 2)
        output = query.new_empty(query.shape)
        for part in metadata:
            rows = query if part.rows is None else query[part.rows]
            target = output if part.rows is None else torch.empty_like(rows)
            pages = self._kernel_blocks_per_page(key, call) if part.decode else None
            if pages is None:
                self._varlen(target, rows, key, value, part, call)
            else:
                self._decode(target, rows, key, value, part, call, pages)
            if part.rows is not None:
                output[part.rows] = target
        return output

    def forward_gathered(
        self,
        query: torch.Tensor,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        step: StepMetadata,
        call: AttentionCall,
    ) -> torch.Tensor:
        """Attention over gathered K and V, laid into a small paged cache of their own (one copy).

        K and V of different widths are filled up with zeros, which add nothing to scores or sums.
        """
        _check_call(call)
        if not keys or query.shape[0] == 0:
            return query.new_empty(*query.shape[:2], values[0].shape[-1] if values else query.shape[-1])
        width_v = values[0].shape[-1]
        width = max(query.shape[-1], width_v)
        rows = pad(query, (0, width - query.shape[-1]))
        output = query.new_empty(rows.shape)
        part = gathered_part(step, query.device)
        self._varlen(output, rows, as_blocks(keys, width), as_blocks(values, width), part, call)
        return output[..., :width_v].contiguous()

    def _kernel_blocks_per_page(self, key: torch.Tensor, call: AttentionCall) -> int | None:
        """From one page to the next in kernel blocks, or ``None`` where the decode kernel cannot serve.

        It cannot where soft cap and window meet, for groups that its buffer does not hold, and where a block has
        to be split but its page is no whole number of kernel blocks, or they are too small to be worth it.
        """
        _, _, block_size, head_size = key.shape
        kernel_block = gcd(block_size, PARTITION)
        if (call.soft_cap is not None and call.sliding_window is not None) or not self._group_fits:
            return None
        if kernel_block == block_size:
            return 1
        pages, rest = divmod(key.stride(0), kernel_block * head_size)
        return None if rest or kernel_block < SMALLEST_KERNEL_BLOCK else pages

    def _decode(
        self,
        output: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        part: Part,
        call: AttentionCall,
        pages: int,
    ) -> None:
        """The single-query kernel; its window counts the keys it keeps, as ``call.sliding_window`` does."""
        block_size, window = key.shape[2], call.sliding_window
        kernel_block = gcd(block_size, PARTITION)
        if kernel_block != block_size:
            key, value = (_in_kernel_blocks(cache, kernel_block, pages) for cache in (key, value))
        wanted = (pages, window)
        if wanted not in part.decode_views:
            part.decode_views[wanted] = decode_view(part, block_size, kernel_block, pages, window)
        view = part.decode_views[wanted]
        self._kernels.single_query_cached_kv_attention(
            output, query, key, value, self._head_mapping, call.scale, view.tables, view.seq_lens, kernel_block,
            view.longest, None, window or -1, 1.0, 1.0, call.soft_cap or -1.0,
        )  # fmt: skip

    def _varlen(
        self,
        output: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        part: Part,
        call: AttentionCall,
    ) -> None:
        """The varlen kernel; its windows count the keys beside the query's own, on either side."""
        left = -1 if call.sliding_window is None else call.sliding_window - 1
        right = -1 if call.causal else left
        self._kernels.flash_attn_varlen_func(
            output, query, key, value, part.query_start, part.key_start, part.longest_query, part.longest, call.scale,
            call.causal, part.tables, None, left, right, "auto", 1.0, 1.0, call.soft_cap or -1.0,
        )  # fmt: skip


def _in_kernel_blocks(cache: torch.Tensor, kernel_block: int, pages: int) -> torch.Tensor:
    """Pages (num_blocks, Hk, block_size, D) seen as kernel blocks, ``pages`` of them from one page to the next.

    Kernel block ``b * pages + i`` starts at token ``i * kernel_block`` of block ``b``; heads stay a whole block
    apart, so kernel blocks overlap in what they span but not in what is read. Nothing is copied.
    """
    num_blocks, num_heads, block_size, head_size = cache.shape
    count = (num_blocks - 1) * pages + block_size // kernel_block
    strides = (kernel_block * head_size, block_size * head_size, head_size, 1)
    return cache.as_strided((count, num_heads, kernel_block, head_size), strides)


def _check_call(call: AttentionCall) -> None:
    call.refuse_own_masks("flash by ipex")
    if call.sinks is not None:
        raise BackendError(
            "flash by ipex has no attention sinks, but the layer has them",
            option="backend", value="flash", expected="a backend with sinks",
        )  # fmt: skip
    if call.sliding_window == 1:
        raise BackendError(
            "flash by ipex computes a sliding window of 1 wrong: its varlen kernel takes it for no window",
            option="sliding_window", value=1, expected="a window of 2 or more",
        )  # fmt: skip


def _check_pages(query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor) -> None:
    """Refuse what the kernels would read without a word: other strides give wrong sums, other shapes a crash."""
    if key_cache.dtype != query.dtype or value_cache.dtype != query.dtype:
        raise BackendError(
            f"flash by ipex reads K and V of the queries' dtype {query.dtype}, not {key_cache.dtype}",
            option="kv_cache_dtype", value=str(key_cache.dtype), expected=str(query.dtype),
        )  # fmt: skip
    _, block_size, num_heads, head_size = key_cache.shape
    if value_cache.shape != key_cache.shape or query.shape[-1] != head_size:
        raise BackendError(
            f"flash by ipex takes one head size; queries have {query.shape[-1]}, K {head_size}, "
            f"V {value_cache.shape[-1]}",
            option="backend", value="flash", expected="one head size for queries, K and V",
        )  # fmt: skip
    for name, cache in (("K", key_cache), ("V", value_cache)):
        block, token, head, last = cache.stride()
        good = last == 1 and (block_size == 1 or token == head_size)
        good = good and (num_heads == 1 or head == block_size * head_size)
        if not good or block != key_cache.stride(0):
            raise BackendError(
                f"flash by ipex reads HND pages: token stride {head_size}, head stride {block_size * head_size} and "
                f"one block stride for K and V; {name} has token stride {token}, head stride {head}, block stride "
                f"{block}",
                option="layout", value=list(cache.stride()), expected=["HND", "cross_layer_HND"],
            )  # fmt: skip
