"""The attention cases: decode, prefill and mixed steps over a paged cache whose blocks lie in random order."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from makeready.attention_backends.metadata import StepMetadata
from makeready.cache.specs import AttentionSpec

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One step of one layer. ``requests``: (query tokens, tokens in the cache once they are written) each."""

    name: str
    kind: str
    """``decode``, ``prefill`` or ``mixed``."""
    requests: tuple[tuple[int, int], ...]
    heads: tuple[int, int]
    """Query heads, KV heads."""
    head_size: int
    block_size: int

    @property
    def query_lens(self) -> tuple[int, ...]:
        return tuple(query for query, _ in self.requests)

    @property
    def seq_lens(self) -> tuple[int, ...]:
        return tuple(length for _, length in self.requests)

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V that must be read once, at two bytes an element."""
        return 2 * 2 * sum(self.seq_lens) * self.heads[1] * self.head_size

    @property
    def flops(self) -> int:
        """Operations of causal attention: 2 for Q K^T and 2 for P V of each pair that is seen."""
        pairs = sum(query * length - query * (query - 1) // 2 for query, length in self.requests)
        return 4 * self.heads[0] * self.head_size * pairs


def _decode(batch: int, tokens: int, heads: tuple[int, int], head_size: int, block_size: int) -> Case:
    length = f"{tokens // 1024}k"
    name = f"decode {batch} x {length}, {heads[0]}/{heads[1]}/{head_size}, block {block_size}"
    return Case(name, "decode", ((1, tokens),) * batch, heads, head_size, block_size)


def _prefill(batch: int, tokens: int, heads: tuple[int, int], head_size: int, block_size: int) -> Case:
    name = f"prefill {batch} x {tokens // 1024}k, {heads[0]}/{heads[1]}/{head_size}, block {block_size}"
    return Case(name, "prefill", ((tokens, tokens),) * batch, heads, head_size, block_size)


LLAMA, NARROW, WIDE = (32, 8), (32, 2), (16, 2)

CASES = (
    _decode(64, 4096, LLAMA, 128, 16),
    _decode(64, 4096, LLAMA, 128, 64),
    _decode(256, 1024, LLAMA, 128, 16),
    _decode(1, 131072, LLAMA, 128, 16),
    _decode(64, 8192, NARROW, 128, 64),
    _decode(64, 8192, NARROW, 128, 2112),
    _decode(32, 8192, WIDE, 256, 544),
    _prefill(1, 8192, LLAMA, 128, 16),
    _prefill(4, 4096, LLAMA, 128, 64),
    Case(
        "mixed 2k chunk at 16k and 32 decodes at 4k, 32/8/128, block 16",
        "mixed",
        ((2048, 16384), *[(1, 4096)] * 32),
        LLAMA,
        128,
        16,
    ),
)
"""The cases of the published anchors, FlashAttention-3's among them."""

SMALL = (
    Case("decode, ragged, 4/2/64, block 16", "decode", ((1, 5), (1, 33), (1, 64)), (4, 2), 64, 16),
    Case("prefill, ragged, 4/2/64, block 16", "prefill", ((7, 7), (40, 40)), (4, 2), 64, 16),
    Case("mixed, 4/2/64, block 48", "mixed", ((20, 50), (1, 31), (1, 97)), (4, 2), 64, 48),
)
"""The same kinds in seconds on a CPU, to try the benchmark itself."""


@dataclass(frozen=True)
class Tensors:
    """A case on the device. Everything that no token was written to is NaN, but for the tails of handed-out blocks."""

    case: Case
    query: torch.Tensor
    """(T, Hq, D)."""
    key_cache: torch.Tensor
    """(num_blocks, block_size, Hk, D), strided as the cache lays it out (NHD)."""
    value_cache: torch.Tensor
    step: StepMetadata

    @property
    def spec(self) -> AttentionSpec:
        heads, kv_heads = self.case.heads
        dtype = next(name for name, kind in DTYPES.items() if kind == self.query.dtype)
        return AttentionSpec(
            num_query_heads=heads,
            num_kv_heads=kv_heads,
            head_size=self.case.head_size,
            head_size_v=self.case.head_size,
            dtype=dtype,
        )


def build(case: Case, device: torch.device, dtype: torch.dtype, *, captured: bool, seed: int = 0) -> Tensors:
    """Random queries, keys and values of ``case``, its blocks scattered over a cache with some blocks to spare."""
    block_size, (heads, kv_heads), width = case.block_size, case.heads, case.head_size
    counts = [-(-length // block_size) for length in case.seq_lens]
    num_blocks = 1 + sum(counts) + max(4, sum(counts) // 50)
    ids = list(range(1, num_blocks))
    random.Random(seed).shuffle(ids)
    take = iter(ids)
    tables = [[next(take) for _ in range(count)] for count in counts]
    generator = torch.Generator(device).manual_seed(seed)
    pages = torch.full((num_blocks, block_size, 2, kv_heads, width), float("nan"), dtype=dtype, device=device)
    for table, length in zip(tables, case.seq_lens, strict=True):
        rows = torch.zeros(len(table) * block_size, 2, kv_heads, width, dtype=dtype, device=device)
        rows[:length] = torch.randn(length, 2, kv_heads, width, dtype=dtype, device=device, generator=generator)
        pages[torch.tensor(table, device=device)] = rows.view(len(table), block_size, 2, kv_heads, width)
    query = torch.randn(sum(case.query_lens), heads, width, dtype=dtype, device=device, generator=generator)
    step = _step(case, tables, device, captured=captured)
    return Tensors(case, query, pages[:, :, 0], pages[:, :, 1], step)


def _step(case: Case, tables: list[list[int]], device: torch.device, *, captured: bool) -> StepMetadata:
    longest, size = max(map(len, tables)), case.block_size
    slots = [
        table[place // size] * size + place % size
        for table, (query, length) in zip(tables, case.requests, strict=True)
        for place in range(length - query, length)
    ]
    starts = torch.tensor((0, *case.query_lens)).cumsum(0)
    padded = [table + [0] * (longest - len(table)) for table in tables]
    return StepMetadata(
        query_start=starts.to(device, torch.int32),
        seq_lens=torch.tensor(case.seq_lens, dtype=torch.int32, device=device),
        block_table=torch.tensor(padded, dtype=torch.int32, device=device),
        slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
        query_lens_host=case.query_lens,
        seq_lens_host=case.seq_lens,
        block_size=size,
        captured=captured,
    )


def expected(tensors: Tensors) -> torch.Tensor:
    """(T, Hq, D) float32: softmax(Q K^T / sqrt(D)) V, request after request, in float32 throughout."""
    case, step = tensors.case, tensors.step
    group = case.heads[0] // case.heads[1]
    outputs, start = [], 0
    for row, (count, length) in enumerate(case.requests):
        blocks = step.block_table[row, : -(-length // case.block_size)].long()
        keys = tensors.key_cache[blocks].flatten(0, 1)[:length].float().repeat_interleave(group, 1)
        values = tensors.value_cache[blocks].flatten(0, 1)[:length].float().repeat_interleave(group, 1)
        query = tensors.query[start : start + count].float()
        outputs.append(_causal(query, keys, values, length - count))
        start += count
    return torch.cat(outputs)


def _causal(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, offset: int) -> torch.Tensor:
    """A thousand queries at a time, so that the scores of a long prefill fit in memory."""
    places = torch.arange(len(keys), device=query.device)
    outputs = []
    for first in range(0, len(query), 1024):
        part = query[first : first + 1024]
        scores = torch.einsum("qhd,khd->hqk", part, keys) * part.shape[-1] ** -0.5
        own = torch.arange(first, first + len(part), device=query.device) + offset
        scores.masked_fill_(places[None] > own[:, None], float("-inf"))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
    return torch.cat(outputs)
