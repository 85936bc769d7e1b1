"""Libraries whose kernel serves a whole step in one call: packed queries, paged K and V, a block table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch.nn.functional import pad

from ...errors import BackendError
from ..interface import AttentionCall, AttentionImpl
from ..metadata import StepMetadata


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCall:
    """What such a kernel is called with; each library's adaptor names it in the library's words."""

    query: torch.Tensor
    """(T, Hq, D), packed request after request."""
    key: torch.Tensor
    """(num_blocks, block_size, Hk, D), strided, last axis contiguous."""
    value: torch.Tensor
    query_start: torch.Tensor
    """(B + 1,) int32."""
    seq_lens: torch.Tensor
    """(B,) int32."""
    block_table: torch.Tensor
    """(B, blocks of the longest request) int32, rows strided."""
    max_query_len: int
    max_seq_len: int
    scale: float
    causal: bool
    window: tuple[int, int]
    """Keys seen before and after a query's own; -1 for all."""
    soft_cap: float | None
    sinks: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A step as every layer's call needs it."""

    step: StepMetadata
    block_table: torch.Tensor
    """The columns that the longest request uses: kernels choose their splits by the table's width."""
    max_query_len: int
    max_seq_len: int


class OneCallAttention(AttentionImpl):
    """Attention by one call of a library's kernel.

    :param attend: the library's adaptor; returns (T, Hq, D).
    :param provider: its name, for sentences.
    :param capturable: whether the call may run inside a CUDA graph.
    :param reads_unwritten_slots: whether the kernel multiplies by what lies in a last block's unwritten tail.
    :param block_size: of the small cache that gathered K and V are laid into.
    """

    name = "flash"

    def __init__(
        self,
        attend: Callable[[KernelCall], torch.Tensor],
        *,
        provider: str,
        capturable: bool,
        reads_unwritten_slots: bool,
        block_size: int,
    ) -> None:
        self._attend = attend
        self.provider = provider
        self.capturable = capturable
        self.reads_unwritten_slots = reads_unwritten_slots
        self._gathered_block = block_size

    def prepare(self, step: StepMetadata) -> Prepared:
        """The step's bounds, and the part of its table that is used. Views only: nothing is copied or launched."""
        longest = max(step.seq_lens_host, default=0)
        columns = max(1, -(-longest // step.block_size))
        return Prepared(
            step=step,
            block_table=step.block_table[:, :columns],
            max_query_len=max(step.query_lens_host, default=0),
            max_seq_len=max(1, longest),
        )

    def forward(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        metadata: Prepared,
        call: AttentionCall,
    ) -> torch.Tensor:
        """Attention over the pages; shapes as in :class:`AttentionImpl`.

        :raises BackendError: for K and V of different widths, or of another dtype than the queries, and for ALiBi.
        """
        if query.shape[0] == 0:
            return torch.empty_like(query)
        self._check(query, key_cache, value_cache, call)
        around = -1 if call.sliding_window is None else call.sliding_window - 1
        output = self._attend(
            KernelCall(
                query=query.contiguous(),
                key=key_cache,
                value=value_cache,
                query_start=metadata.step.query_start,
                seq_lens=metadata.step.seq_lens,
                block_table=metadata.block_table,
                max_query_len=metadata.max_query_len,
                max_seq_len=metadata.max_seq_len,
                scale=call.scale * call.key_scale,
                causal=call.causal,
                window=(around, 0 if call.causal else around),
                soft_cap=call.soft_cap,
                sinks=call.sinks,
            )
        ).contiguous()
        return output if call.value_scale == 1.0 else output * call.value_scale

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
        width_v = values[0].shape[-1] if values else query.shape[-1]
        if not keys or query.shape[0] == 0:
            return query.new_empty(*query.shape[:2], width_v)
        width, size = max(query.shape[-1], width_v), self._gathered_block
        counts = [-(-length // size) for length in step.seq_lens_host]
        first = (0, *accumulate(counts))
        table = torch.zeros(len(counts), max(1, *counts), dtype=torch.int32)
        for row, count in enumerate(counts):
            table[row, :count] = torch.arange(first[row], first[row] + count)
        small = replace(step, block_table=table.to(query.device), block_size=size)
        rows = pad(query, (0, width - query.shape[-1]))
        key, value = _as_blocks(keys, width, size), _as_blocks(values, width, size)
        return self.forward(rows, key, value, self.prepare(small), call)[..., :width_v].contiguous()

    def _check(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall) -> None:
        """Refuse what a kernel may take without a word and sum wrong."""
        call.refuse_own_masks(f"flash by {self.provider}")
        if call.alibi_slopes is not None:
            raise BackendError(
                f"flash by {self.provider} is not asked for ALiBi, and the layer has slopes",
                option="flash_provider", value=self.provider, expected="triton, or another backend",
            )  # fmt: skip
        if key.shape != value.shape or query.shape[-1] != key.shape[-1]:
            raise BackendError(
                f"flash by {self.provider} takes one head size; queries have {query.shape[-1]}, K {key.shape[-1]}, "
                f"V {value.shape[-1]}",
                option="flash_provider", value=self.provider, expected="one head size for queries, K and V",
            )  # fmt: skip
        if key.dtype != query.dtype or value.dtype != query.dtype:
            raise BackendError(
                f"flash by {self.provider} reads K and V of the queries' dtype {query.dtype}, not {key.dtype}",
                option="kv_cache_dtype", value=str(key.dtype), expected=str(query.dtype),
            )  # fmt: skip


def _as_blocks(gathered: Sequence[torch.Tensor], width: int, size: int) -> torch.Tensor:
    """Per request (length, Hk, D) -> (num_blocks, size, Hk, width), filled up with zeros."""
    blocks = []
    for rows in gathered:
        filled = pad(rows, (0, width - rows.shape[-1], 0, 0, 0, -rows.shape[0] % size))
        blocks.append(filled.view(-1, size, *filled.shape[1:]))
    return torch.cat(blocks)
