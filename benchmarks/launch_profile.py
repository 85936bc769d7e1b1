"""What the device does in a step of decodes: kernels by kind, and the time between them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
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

    ``idle`` is the share of the profiled time in which no kernel was there; one that is set up early and waits is.

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
    kernels = [event for event in profile.events() if event.device_type.name == "CUDA"]
    return {"step_ms": wall, **_summary(kernels)}


def _summary(kernels: Sequence[Any]) -> dict[str, Any]:
    """Kernels that overlap, since they run side by side or are set up early, share their time in no other figure."""
    kinds: dict[str, float] = defaultdict(float)
    names: dict[str, float] = defaultdict(float)
    for event in kernels:
        kinds[_kind(event.name)] += event.time_range.elapsed_us() / 1e3 / STEPS
        names[event.name[:60]] += event.time_range.elapsed_us() / STEPS
    shown: dict[str, Any] = {f"{kind}_ms": kinds[kind] for kind in sorted(kinds, key=lambda kind: -kinds[kind])}
    slowest = sorted(names, key=lambda name: -names[name])[:TOP]
    spans = [(event.time_range.start, event.time_range.end) for event in kernels]
    whole = max(end for _, end in spans) - min(start for start, _ in spans)
    busy = _covered_us(spans)
    return {
        "busy_ms": busy / 1e3 / STEPS,
        "idle": 1 - busy / whole,
        "kernels": len(kernels) / STEPS,
        **shown,
        "top_us": {name: round(names[name], 1) for name in slowest},
    }


def _covered_us(spans: Sequence[tuple[float, float]]) -> float:
    """Time in which at least one of ``spans`` runs."""
    covered, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered


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
