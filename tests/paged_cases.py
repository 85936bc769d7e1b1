"""Requests whose K and V are known densely and also lie, scattered, in a poisoned paged cache."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from makeready.attention_backends.metadata import StepMetadata


@dataclass(frozen=True)
class Case:
    query: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    step: StepMetadata


def make_case(
    seq_lens,
    q_lens,
    *,
    block_size=16,
    heads=(4, 2),
    head_size=16,
    head_size_v=None,
    dtype=torch.float32,
    layout="NHD",
    placement="random",
    num_blocks=None,
    clear=True,
    device="cpu",
    seed=0,
    slots=3,
) -> Case:
    """B requests. Memory outside handed-out blocks is NaN; with ``clear`` their unwritten tail is zero."""
    head_size_v = head_size_v or head_size
    num_heads, num_kv_heads = heads
    rng = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=rng).to(dtype).to(device)

    keys = [randn(length, num_kv_heads, head_size) for length in seq_lens]
    values = [randn(length, num_kv_heads, head_size_v) for length in seq_lens]
    tables = place([-(-length // block_size) for length in seq_lens], num_blocks, placement, seed)
    num_blocks = num_blocks or 1 + sum(map(len, tables)) + 3
    key_cache, value_cache = cache_views(
        layout, num_blocks, slots, block_size, num_kv_heads, head_size, head_size_v, dtype, device
    )
    for table, key, value in zip(tables, keys, values, strict=True):
        if clear:
            key_cache[table] = 0
            value_cache[table] = 0
        for number, block in enumerate(table):
            part = slice(number * block_size, (number + 1) * block_size)
            key_cache[block, : len(key[part])] = key[part]
            value_cache[block, : len(value[part])] = value[part]
    return Case(
        randn(sum(q_lens), num_heads, head_size),
        keys,
        values,
        key_cache,
        value_cache,
        step_of(seq_lens, q_lens, tables, block_size, device),
    )


def step_of(seq_lens, q_lens, tables, block_size, device="cpu") -> StepMetadata:
    width = max(map(len, tables), default=1)
    slots = [
        table[position // block_size] * block_size + position % block_size
        for table, length, q_len in zip(tables, seq_lens, q_lens, strict=True)
        for position in range(length - q_len, length)
    ]
    starts = torch.tensor([0, *q_lens]).cumsum(0)
    return StepMetadata(
        query_start=starts.to(torch.int32).to(device),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
        block_table=torch.tensor(
            [table + [0] * (width - len(table)) for table in tables], dtype=torch.int32, device=device
        ),
        slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
        query_lens_host=tuple(q_lens),
        seq_lens_host=tuple(seq_lens),
        block_size=block_size,
    )


def place(counts, num_blocks, placement, seed) -> list[list[int]]:
    """Block ids of each request; block 0 is never handed out."""
    total = sum(counts)
    ids = list(range(1, num_blocks or total + 4))
    if placement == "reversed":
        ids.reverse()
    elif placement == "random":
        random.Random(seed).shuffle(ids)
    if placement != "interleaved":
        take = iter(ids)
        return [[next(take) for _ in range(count)] for count in counts]
    tables: list[list[int]] = [[] for _ in counts]
    while any(len(table) < count for table, count in zip(tables, counts, strict=True)):
        for table, count in zip(tables, counts, strict=True):
            if len(table) < count:
                table.append(ids.pop(0))
    return tables


def cache_views(layout, num_blocks, slots, block_size, num_kv_heads, head_size, head_size_v, dtype, device):
    """K and V of one layer, shape (num_blocks, block_size, Hk, D), in one of the physical orders."""
    row = num_kv_heads * (head_size + head_size_v)
    page = block_size * row
    buffer = torch.full((num_blocks * slots * page,), float("nan"), dtype=dtype, device=device)
    cross = layout.startswith("cross_layer")
    block_stride = page * slots if cross else page
    offset = page if cross else page * num_blocks  # the layer in slot 1
    if layout.endswith("NHD"):
        key_strides, value_strides = (row, head_size, 1), (row, head_size_v, 1)
        value_offset = offset + num_kv_heads * head_size
    else:
        key_strides = (head_size, block_size * head_size, 1)
        value_strides = (head_size_v, block_size * head_size_v, 1)
        value_offset = offset + num_kv_heads * block_size * head_size
    shape = (num_blocks, block_size, num_kv_heads)
    return (
        buffer.as_strided((*shape, head_size), (block_stride, *key_strides), offset),
        buffer.as_strided((*shape, head_size_v), (block_stride, *value_strides), value_offset),
    )
