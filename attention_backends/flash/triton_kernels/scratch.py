"""How much memory our Triton kernels take beside the cache: the same numbers as ``launch`` allocates. No torch."""

from __future__ import annotations

from ....cache.specs import AttentionSpec
from ....device import DeviceFacts
from ...workspace import StepLimits, Workspace
from .configs import LATENT_HEADS, LONG_QUERIES, DecodeConfig, PrefillConfig, short_queries
from .tuned import Configs, padded, read_table

MOST_UNITS = 192
"""Multiprocessors of a device that is only planned for: more than any has that this ran on."""
GATHERED_BYTES = 2
"""Of a number of gathered K and V: half precision, also of fp8."""


def workspace_of(spec: AttentionSpec, device: DeviceFacts, limits: StepLimits, *, invariant: bool) -> Workspace:
    """Partial sums of decodes, which a step keeps, and K and V in one piece, which a prefill has for one layer.

    A step gathers one long sequence at most and its own tokens: prefills are taken up in order, so that only the
    first of them goes on from a context.
    """
    configs = Configs(read_table() if device.present else ())
    group, narrow = spec.num_query_heads // spec.num_kv_heads, spec.dtype.startswith("fp8")
    width, width_v = padded(spec.head_size), padded(spec.head_size_v)
    kept = 0
    for queries in sorted({1, 1 if invariant else short_queries(group)}):
        config = configs.decode(
            device, head_size=max(width, width_v), rows=queries * group, narrow=narrow, invariant=invariant,
            max_model_len=limits.max_model_len,
        )  # fmt: skip
        rows = max(config.rows, 1 << (queries * group - 1).bit_length())
        kept += 4 * _slots(config, spec.num_kv_heads, device, limits) * spec.num_kv_heads * rows * (width_v + 2)
    longest = configs.prefill(
        device, spec.head_size, spec.head_size_v, group, requests=1, queries=limits.max_num_batched_tokens,
        keys=limits.max_model_len, block_size=16, causal=True, narrow=narrow, invariant=invariant,
        max_model_len=limits.max_model_len,
    )  # fmt: skip
    numbers = _gathered(longest, limits) * spec.num_kv_heads * (width + width_v)
    return Workspace(kept_bytes=kept, layer_bytes=GATHERED_BYTES * numbers)


def latent_workspace(spec: AttentionSpec, device: DeviceFacts) -> Workspace:
    """Partial sums of decodes over latents: at most one program a multiprocessor, where programs share a request."""
    rows = (device.compute_units or MOST_UNITS) * LATENT_HEADS
    return Workspace(layer_bytes=4 * rows * (padded(spec.head_size) + 2))


def _slots(config: DecodeConfig, heads: int, device: DeviceFacts, limits: StepLimits) -> int:
    """Places for partial sums."""
    if config.fixed:
        return limits.max_num_seqs * (-(-limits.max_model_len // (config.tile * config.fixed)) + 1)
    return 4 * max(1, (device.compute_units or MOST_UNITS) * config.programs // heads)


def _gathered(config: PrefillConfig, limits: StepLimits) -> int:
    """Tokens whose K and V are copied into one piece, each request's rounded up to whole tiles."""
    if limits.max_num_batched_tokens < LONG_QUERIES:
        return 0
    requests = min(limits.max_num_seqs, limits.max_num_batched_tokens // LONG_QUERIES)
    return limits.max_model_len + limits.max_num_batched_tokens + requests * config.block_n
