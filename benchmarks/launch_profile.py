"""What the device does in a step of decodes: kernels by kind, and the time between them."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch

from makeready.engines.transformers.engine import SamplingParams, TransformersEngine

STEPS = 8
TOP = 24
"""Kernels that a row names."""
PROFILED_TOKENS = 96
"""What each request may generate while it is looked at."""
KINDS = (
    (
        "matmul",
        ("gemm", "gemv", "cutlass", "nvjet", "splitk", "_mm_", "wgmma", "cublas", "token_kernel", "tokens_kernel"),
    ),
    ("attention", ("attention", "flash", "flex", "attend", "write_kv", "decode_kernel", "combine", "reduce_split")),
    ("mixers", ("conv", "mamba", "ssd", "scan", "delta", "state_update", "chunk")),
    ("copies", ("memcpy", "memset")),
)
"""Words in a kernel's name, in this order; the rest is elementwise."""


def profile_decodes(engine: TransformersEngine, batch: int, prompt: int, *, device: str) -> dict[str, Any]:
    """Milliseconds per step of decodes: by the clock without a profiler, and on the device by kind of kernel.

    :param batch: requests that decode.
    """
    params = SamplingParams(max_new_tokens=PROFILED_TOKENS, ignore_eos=True)
    prompts = [[(7 * row + 3 * place) % 199 + 5 for place in range(prompt)] for row in range(batch)]
    ids = [engine.add_request(tokens, params) for tokens in prompts]
    try:
        while any(request.is_prefill for request in engine.scheduler.running) or engine.scheduler.waiting:
            engine.step()
        engine.step()
        wall = _timed_steps(engine, device)
        if device != "cuda":
            return {"step_ms": wall}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            _timed_steps(engine, device)
    finally:
        for request_id in ids:
            engine.abort(request_id)
    kinds: dict[str, float] = defaultdict(float)
    kernels = 0
    found = profile.key_averages()
    for event in found:
        kinds[_kind(event.key)] += event.self_device_time_total / 1e3 / STEPS
        kernels += event.count
    busy = sum(kinds.values())
    shown: dict[str, Any] = {f"{kind}_ms": kinds[kind] for kind in sorted(kinds, key=lambda kind: -kinds[kind])}
    slowest = sorted(found, key=lambda event: -event.self_device_time_total)[:TOP]
    shown["top_us"] = {event.key[:60]: round(event.self_device_time_total / STEPS, 1) for event in slowest}
    return {"step_ms": wall, "busy_ms": busy, "idle": 1 - busy / wall, "kernels": kernels / STEPS, **shown}


def _timed_steps(engine: TransformersEngine, device: str) -> float:
    _wait(device)
    begun = time.perf_counter()
    for _ in range(STEPS):
        engine.step()
    _wait(device)
    return 1e3 * (time.perf_counter() - begun) / STEPS


def _kind(kernel: str) -> str:
    name = kernel.lower()
    return next((kind for kind, words in KINDS if any(word in name for word in words)), "elementwise")


def _wait(device: str) -> None:
    if device != "cpu":
        getattr(torch, device).synchronize()
