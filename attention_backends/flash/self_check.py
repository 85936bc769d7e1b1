"""A look before the leap: a provider's kernels against the reference, on the device, at the shape that was asked for.

Third-party kernels that read strides other than they were written for do not fail, they sum wrong numbers. This
finds it at build time, in milliseconds, on memory where everything that must not be read is NaN.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...errors import BackendError
from ..interface import AttentionCall, AttentionImpl, BuildRequest
from ..metadata import StepMetadata
from ..reference.impl import ReferenceAttention

TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest difference, for keys, values and queries drawn from a normal distribution."""


def check_against_reference(
    attention: AttentionImpl, request: BuildRequest, *, provider: str, order: str = "HND", thorough: bool = True
) -> None:
    """Run ``attention`` on small caches: decode and mixed, plain, with a window, with a soft cap.

    :param order: of the pages: ``HND`` or ``NHD``, as in ``config.LAYOUTS``.
    :param thorough: also a window and a soft cap that the request does not have; each may have to be compiled.
    :raises BackendError: where it differs from the reference; names the provider, the case and the difference.
    """
    allowed = TOLERANCE[request.dtype]
    for case, difference in differences(attention, request, order=order, thorough=thorough):
        if not difference <= allowed:
            raise BackendError(
                f"flash by {provider} failed its self-check on {request.device.device_type}: {case} differs from the "
                f"reference by {difference:.1e}, allowed is {allowed:.0e}",
                option="backend",
                value="flash",
                expected="kernels that agree with the reference",
            )


def differences(
    attention: AttentionImpl, request: BuildRequest, *, order: str = "HND", thorough: bool = True
) -> Iterator[tuple[str, float]]:
    """(what was run, largest difference) for every case; NaN where the output holds NaN."""
    device, dtype = torch.device(request.device.device_type), getattr(torch, request.dtype)
    # MLA layers expand their latent first: what the kernels see there are as many KV heads as query heads.
    num_heads = request.spec.num_query_heads
    num_kv_heads = num_heads if request.spec.mla else request.spec.num_kv_heads
    head_size = 64 if request.spec.mla else request.spec.head_size
    random = torch.Generator().manual_seed(0)
    seq_lens = (request.block_size + 3, 150, 5)
    for step_name, query_lens in (("decode", (1, 1, 1)), ("prefill and decode", (1, 150, 5))):
        step = _step(query_lens, seq_lens, request.block_size, device)
        key, value = _cache(
            step, num_kv_heads, head_size, random, dtype, order=order, poisoned=not attention.reads_unwritten_slots
        )
        query = torch.randn(sum(query_lens), num_heads, head_size, generator=random).to(device, dtype)
        for call_name, window, soft_cap in _calls(request, thorough):
            call = AttentionCall(scale=head_size**-0.5, sliding_window=window, soft_cap=soft_cap)
            output = _run(attention, query, key, value, step, call, gathered=request.spec.mla)
            expected = ReferenceAttention().forward(query, key, value, step, call)
            yield step_name + call_name, (output.float() - expected.float()).abs().max().item()


def _calls(request: BuildRequest, thorough: bool) -> Iterator[tuple[str, int | None, float | None]]:
    """(name, window, soft cap) of each call."""
    yield "", None, None
    window = request.spec.sliding_window
    if window is not None or thorough:
        yield f" with a window of {window or 7}", window or 7, None
    if request.soft_cap is not None or thorough:
        yield " with a soft cap", None, 2.0


def _run(
    attention: AttentionImpl,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    step: StepMetadata,
    call: AttentionCall,
    *,
    gathered: bool,
) -> torch.Tensor:
    """The call that layers of this kind make: over pages, or over what they gathered from them."""
    if not gathered:
        return attention.forward(query, key, value, attention.prepare(step), call)
    tables = [row.long() for row in step.block_table]
    keys, values = (
        [cache[row].flatten(0, 1)[:length] for row, length in zip(tables, step.seq_lens_host, strict=True)]
        for cache in (key, value)
    )
    return attention.forward_gathered(query, keys, values, step, call)


def _step(
    query_lens: tuple[int, ...], seq_lens: tuple[int, ...], block_size: int, device: torch.device
) -> StepMetadata:
    """A step whose blocks are handed out backwards, so that no two of a request follow each other in memory."""
    counts = [-(-length // block_size) for length in seq_lens]
    table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
    free = list(range(1, sum(counts) + 1))
    for row, count in enumerate(counts):
        table[row, :count] = torch.tensor([free.pop() for _ in range(count)], dtype=torch.int32)
    starts = torch.tensor((0, *query_lens), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return StepMetadata(
        query_start=starts.to(device),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
        block_table=table.to(device),
        # Nothing is written in this step: its keys lie in the cache already.
        slot_mapping=torch.full((sum(query_lens),), -1, dtype=torch.int64, device=device),
        query_lens_host=query_lens,
        seq_lens_host=seq_lens,
        block_size=block_size,
    )


def _cache(
    step: StepMetadata,
    num_kv_heads: int,
    head_size: int,
    random: torch.Generator,
    dtype: torch.dtype,
    *,
    order: str,
    poisoned: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V (num_blocks, block_size, Hk, D) in pages of one buffer, NaN but for the tokens of the step.

    :param poisoned: false clears the unwritten tail of blocks that are handed out, as an engine would.
    """
    device, block_size = step.block_table.device, step.block_size
    num_blocks = int(step.block_table.max()) + 1
    if order.endswith("HND"):
        pages = torch.full((num_blocks, 2, num_kv_heads, block_size, head_size), torch.nan, dtype=dtype, device=device)
        key, value = pages[:, 0].transpose(1, 2), pages[:, 1].transpose(1, 2)
    else:
        pages = torch.full((num_blocks, block_size, 2, num_kv_heads, head_size), torch.nan, dtype=dtype, device=device)
        key, value = pages[:, :, 0], pages[:, :, 1]
    for row, length in zip(step.block_table, step.seq_lens_host, strict=True):
        for start in range(0, length, block_size):
            count = min(block_size, length - start)
            drawn = torch.randn(2, num_kv_heads, count, head_size, generator=random).transpose(1, 2).to(device, dtype)
            block = int(row[start // block_size])
            if not poisoned:
                pages[block] = 0
            key[block, :count], value[block, :count] = drawn[0], drawn[1]
    return key, value
