"""Launching the kernels: from tensors and a configuration to grids and arguments. Nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton

from ....early_launch import early_launch
from ...interface import AttentionCall
from ...metadata import StepMetadata
from .configs import DecodeConfig, PrefillConfig
from .decode import decode_kernel, plan_kernel
from .items import tile_items
from .prefill import COPIES, GATHERED, PAGES, gather_kernel, prefill_kernel

LOG2E = 1.4426950408889634
SOURCES = {"pages": PAGES.value, "gathered": GATHERED.value, "copies": COPIES.value}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Numbers of a layer that kernels are compiled for."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    head_size_v: int

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def padded(self) -> int:
        """The head size as tiles have it."""
        return max(16, int(triton.next_power_of_2(self.head_size)))

    @property
    def padded_v(self) -> int:
        """The value's head size as tiles have it."""
        return max(16, int(triton.next_power_of_2(self.head_size_v)))


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeWork:
    """How the decodes of a step are shared out, on the device; one for each sliding window."""

    config: DecodeConfig
    programs: int
    fewest: int
    queries: int
    """Query tokens that a request has at most; those with fewer than ``fewest`` are not in it."""
    rows: int
    window: int
    starts: torch.Tensor
    first: torch.Tensor
    count: torch.Tensor
    partial: torch.Tensor
    partial_sums: torch.Tensor


def plan_decode(
    step: StepMetadata, shape: Shape, config: DecodeConfig, compute_units: int, *, fewest: int, queries: int,
    window: int | None,
) -> DecodeWork:  # fmt: skip
    """Share out the requests of ``fewest`` to ``queries`` query tokens; one small kernel, which may be captured."""
    device, heads = step.seq_lens.device, shape.num_kv_heads
    rows = max(config.rows, triton.next_power_of_2(queries * shape.group))
    unit = config.tile * max(config.fixed, 1)
    programs = 2 * max(1, compute_units * config.programs // heads)
    slots = 2 * programs
    if config.fixed:
        slots = sum(-(-length // unit) + 1 for length in step.seq_lens_host)
        programs = min(slots, 2 * programs)
    starts, first, count = (
        torch.empty(size, dtype=torch.int32, device=device)
        for size in (step.num_requests + 2, 8 * programs, step.num_requests * heads)
    )
    partial = torch.empty(slots * heads * rows * (shape.padded_v + 2), dtype=torch.float32, device=device)
    work = DecodeWork(
        config=config, programs=programs, fewest=fewest, queries=queries, rows=rows, window=window or 0,
        starts=starts, first=first, count=count,
        partial=partial[: slots * heads * rows * shape.padded_v],
        partial_sums=partial[slots * heads * rows * shape.padded_v :],
    )  # fmt: skip
    plan_kernel[(1,)](
        step.seq_lens, step.query_start, starts, first, count, step.num_requests, programs,
        HK=heads, FEWEST=fewest, QUERIES=queries, WINDOW=work.window, UNIT=unit, FIXED=config.fixed,
        BLOCK_B=16 if step.num_requests <= 16 and queries == 1 else 256, BLOCK_P=32, num_warps=8,
    )  # fmt: skip
    return work


def decode(
    out: torch.Tensor, lse: torch.Tensor | None, query: torch.Tensor, key_cache: torch.Tensor,
    value_cache: torch.Tensor, step: StepMetadata, shape: Shape, work: DecodeWork, call: AttentionCall,
) -> None:  # fmt: skip
    """Write the rows of ``work``'s requests into ``out``, (T, Hq, Dv)."""
    config = work.config
    decode_kernel[(work.programs * shape.num_kv_heads,)](
        out, lse, query, key_cache, value_cache, step.block_table, step.seq_lens, step.query_start,
        call.sinks, call.alibi_slopes, work.starts, work.first, work.partial, work.partial_sums, work.count,
        step.num_requests, call.scale * call.key_scale * LOG2E, call.soft_cap or 1.0, float(call.value_scale),
        *query.stride()[:2], *key_cache.stride()[:3], *value_cache.stride()[:3], step.block_table.stride(0),
        *out.stride()[:2],
        HK=shape.num_kv_heads, G=shape.group, QUERIES=work.queries, ROWS=work.rows,
        D=shape.head_size, DP=shape.padded, DV=shape.head_size_v, DVP=shape.padded_v,
        BLOCK_SIZE=key_cache.shape[1], TILE=config.tile, STAGES=config.stages, SWAP=config.swap,
        WINDOW=work.window, SOFT_CAP=call.soft_cap is not None, SINKS=call.sinks is not None,
        ALIBI=call.alibi_slopes is not None, LSE=lse is not None, FIXED=config.fixed, EVICT=config.evict,
        num_warps=config.warps, num_stages=config.stages, **early_launch(query.device),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillWork:
    """Tiles of query tokens, the longest first, and where K and V of a request are gathered."""

    config: PrefillConfig
    items: torch.Tensor
    """(n, 2) int32: request, tile."""
    base: torch.Tensor | None
    """(B + 1,) int32: rows of the gathered K and V before each request's."""
    rows: int
    """Rows of them all."""
    longest: int
    """Most rows of one request."""


def plan_prefill(step: StepMetadata, shape: Shape, config: PrefillConfig, *, fewest: int) -> PrefillWork:
    """Tiles of the requests with ``fewest`` query tokens or more, made on the host."""
    room = [
        -(-length // config.block_n) * config.block_n if queries >= fewest else 0
        for length, queries in zip(step.seq_lens_host, step.query_lens_host, strict=True)
    ]
    device = step.seq_lens.device
    gathered = config.source in ("gathered", "copies")
    starts = [0]
    for count in room:
        starts.append(starts[-1] + count)
    return PrefillWork(
        config=config,
        items=tile_items(step, config.block_m // shape.group, fewest=fewest),
        base=_staged(starts, device) if gathered else None,
        rows=starts[-1],
        longest=max(room),
    )


def plan_ragged_prefill(step: StepMetadata, shape: Shape, config: PrefillConfig, *, fewest: int) -> PrefillWork:
    """The same for a captured step, made on the device: K and V stay in their pages."""
    items = tile_items(step, config.block_m // shape.group, fewest=fewest)
    return PrefillWork(config=replace(config, source="pages"), items=items, base=None, rows=0, longest=0)


def prefill(
    out: torch.Tensor, lse: torch.Tensor | None, query: torch.Tensor, key_cache: torch.Tensor,
    value_cache: torch.Tensor, step: StepMetadata, shape: Shape, work: PrefillWork, call: AttentionCall,
) -> None:  # fmt: skip
    """Write the rows of ``work``'s requests into ``out``, (T, Hq, Dv)."""
    config = work.config
    keys, values = key_cache, value_cache
    narrow = key_cache.element_size() == 1
    dtype = torch.float16 if narrow else query.dtype
    if work.base is not None:
        keys, values = _gather(dtype, key_cache, value_cache, step, shape, work, call.sliding_window)
    key_tiles, value_tiles = _descriptors(keys, values, config)
    scale = call.scale * call.key_scale * LOG2E
    prefill_kernel[(len(work.items) * shape.num_kv_heads,)](
        out, lse, query, keys, values, key_tiles, value_tiles, step.block_table, step.seq_lens, step.query_start,
        work.base, work.items, call.sinks, call.alibi_slopes, scale, call.soft_cap or 1.0, float(call.value_scale),
        work.rows, *query.stride()[:2], *key_cache.stride()[:3], *value_cache.stride()[:3],
        step.block_table.stride(0), *out.stride()[:2],
        HK=shape.num_kv_heads, G=shape.group, D=shape.head_size, DP=shape.padded, DV=shape.head_size_v,
        DVP=shape.padded_v, BLOCK_SIZE=key_cache.shape[1], BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        SOURCE=SOURCES[config.source], STAGES=config.stages, CAUSAL=call.causal, WINDOW=call.sliding_window or 0,
        SOFT_CAP=call.soft_cap is not None, SINKS=call.sinks is not None, ALIBI=call.alibi_slopes is not None,
        LSE=lse is not None, FIXED=config.fixed, NARROW=narrow, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def _gather(
    dtype: torch.dtype, key_cache: torch.Tensor, value_cache: torch.Tensor, step: StepMetadata, shape: Shape,
    work: PrefillWork, window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """K and V of the prefills' requests in one piece, (Hk * rows, padded), as ``dtype``."""
    heads, tokens = shape.num_kv_heads, 32
    keys = torch.empty(heads * work.rows, shape.padded, dtype=dtype, device=key_cache.device)
    values = torch.empty(heads * work.rows, shape.padded_v, dtype=dtype, device=key_cache.device)
    gather_kernel[(triton.cdiv(work.longest, tokens), step.num_requests, heads)](
        key_cache, value_cache, keys, values, step.block_table, step.seq_lens, step.query_start, work.base,
        *key_cache.stride()[:3], *value_cache.stride()[:3], step.block_table.stride(0), work.rows,
        HK=heads, D=shape.head_size, DP=shape.padded, DV=shape.head_size_v, DVP=shape.padded_v,
        BLOCK_SIZE=key_cache.shape[1], TOKENS=tokens, WINDOW=window or 0, num_warps=4,
    )  # fmt: skip
    return keys, values


def _descriptors(
    keys: torch.Tensor, values: torch.Tensor, config: PrefillConfig
) -> tuple[object | None, object | None]:
    """Tensor descriptors of K and V, where the configuration loads by them."""
    if config.source != "gathered":
        return None, None
    from triton.tools.tensor_descriptor import TensorDescriptor

    key, value = (TensorDescriptor.from_tensor(x, [config.block_n, x.shape[1]]) for x in (keys, values))
    return key, value


def _staged(values: Sequence[int], device: torch.device) -> torch.Tensor:
    from ....cache.staging import stage

    return stage(values, torch.int32, device)
