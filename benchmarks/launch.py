"""A hybrid model of a published shape from process start to its last token, beside stock ``generate`` in the same run.

Weights are random, decoding is greedy and no token ends a request, so that every case generates what it says. A case
is `batch,prompt,new`; its figure is output tokens over the whole time, prefill included. The first row is the time from
process start to the first token. `host_ms` is the host's own work per step, which runs beside the device's;
`idle` the share of a decode step in which the device did nothing, from a profile of a few steps.

    makeready bench launch --out launch.json
    makeready bench launch --shape nemotron-3-nano --case 8,128,64 --stock 0
    makeready bench launch --shape falcon-h1-tiny --case 2,8,4             # seconds, on any machine
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from makeready.benchmarks.harness import Report, default_device, parser, positive, run_main
from makeready.benchmarks.launch_profile import PROFILED_TOKENS, profile_decodes
from makeready.benchmarks.launch_shapes import SHAPES
from makeready.engines.transformers.engine import SamplingParams, TransformersEngine
from makeready.errors import ConfigError
from makeready.startup import prepare

DEFAULT_SHAPE = "falcon-h1-7b"
CASES = (
    "1,512,128", "8,128,64", "64,512,128", "256,512,128",
    "1,128,128", "1,4096,128", "8,4096,64", "64,128,64", "64,4096,64", "256,128,64",
)  # fmt: skip
"""The first four have figures of vLLM 0.24.0 beside them (docs/performance.md)."""
STOCK_TOKENS = 32
"""New tokens of stock ``generate``, which is slow."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if any case failed."""
    asked = _options().parse_args(arguments)
    cases = [_case(text) for text in asked.case or CASES]
    device = default_device()
    asked.shape = asked.shape or _default_shape(device)
    report = Report("launch", asked, device=device)
    model = random_model(asked.shape, device)
    built = _since_start()
    engine = open_engine(model, asked, cases)
    opened = _since_start()
    _generate(engine, 1, cases[0][1], 1)
    billions = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    report.add(
        case="process start to first token",
        shape=asked.shape,
        s=_since_start(),
        model_s=built,
        engine_s=opened - built,
        parameters_b=billions,
        execution=list(engine.execution.reasons),
    )
    for case in cases:
        try:
            report.add(case=_named(case), **measure(engine, *case))
            report.add(case=f"{_named(case)} steps", **profile_decodes(engine, *case[:2], device=device))
        except Exception as error:  # one case that fails, for memory say, must not take the others along
            report.fail(error, case=_named(case))
    engine.close()
    del engine
    _release(device)
    for case in cases:
        if case[0] <= asked.stock:
            try:
                report.add(case=f"stock generate {_named(case)}", **stock(model, *case[:2], min(case[2], STOCK_TOKENS)))
            except torch.OutOfMemoryError as error:  # its mixers hold products over all pairs of tokens of a chunk
                report.add(case=f"stock generate {_named(case)}", out_of_memory=str(error).partition(". GPU")[0])
                _release(device)
    return report.finish()


def random_model(shape: str, device: str) -> Any:
    """The model with random weights, in bfloat16 on ``device``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(SHAPES[shape])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    return model.eval()


def open_engine(model: Any, asked: argparse.Namespace, cases: Sequence[tuple[int, int, int]]) -> TransformersEngine:
    """The engine as a user would get it, with room for the largest case."""
    longest = max(prompt + max(new, PROFILED_TOKENS) for _, prompt, new in cases)
    options: dict[str, Any] = {
        "dtype": "bfloat16",
        "max_num_seqs": max(batch for batch, _, _ in cases),
        "max_num_batched_tokens": asked.tokens,
        "max_model_len": longest,
    }
    for name in ("backend", "mixer_backend", "mamba_ssm_cache_dtype", "memory_bytes", "platform"):
        if getattr(asked, name) is not None:
            options[name] = getattr(asked, name)
    if asked.memory_bytes is None:
        options["memory_fraction"] = asked.memory_fraction
    for name in ("packed_steps", "compile_layers", "cuda_graphs", "async_scheduling"):
        if getattr(asked, name) is not None:
            options[name] = getattr(asked, name) == "on"
    return TransformersEngine(model, None, prepare({**SHAPES[asked.shape]}, **options))


def measure(engine: TransformersEngine, batch: int, prompt: int, new: int) -> dict[str, Any]:
    """Tokens per second over the whole time, after a run that warms up."""
    cold = _generate(engine, batch, prompt, new)
    times = engine.step_times
    before = (times.steps, times.total_s, times.waited_s) if times else (0, 0.0, 0.0)
    whole = _generate(engine, batch, prompt, new)
    first = _generate(engine, batch, prompt, 1)
    row = {"tokens_per_s": batch * new / whole, "s": whole, "first_token_s": first, "first_run_s": cold}
    if new > 1:
        row["step_ms"] = 1e3 * (whole - first) / (new - 1)
    if times:
        steps = times.steps - before[0]
        row["host_ms"] = 1e3 * (times.total_s - before[1] - times.waited_s + before[2]) / steps
    return row


def stock(model: Any, batch: int, prompt: int, new: int) -> dict[str, Any]:
    """The same by ``model.generate``, fewer tokens."""
    device = model.device
    ids = torch.tensor(_prompts(batch, prompt), device=device)
    mask = torch.ones_like(ids)
    model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False, eos_token_id=-1, pad_token_id=0)
    _wait(device.type)
    begun = time.perf_counter()
    model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    _wait(device.type)
    whole = time.perf_counter() - begun
    return {"tokens_per_s": batch * new / whole, "s": whole, "new": new}


def _generate(engine: TransformersEngine, batch: int, prompt: int, new: int) -> float:
    """Seconds; a bar shows how far it is where somebody watches."""
    prompts, params = _prompts(batch, prompt), SamplingParams(max_new_tokens=new, ignore_eos=True)
    if not sys.stderr.isatty():
        begun = time.perf_counter()
        engine.generate(prompts, params)
        return time.perf_counter() - begun
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"{batch} x {prompt} + {new} tokens", total=batch * new)
        begun = time.perf_counter()
        engine.generate(prompts, params, lambda progress: bar.update(task, completed=progress.tokens))
        return time.perf_counter() - begun


def _prompts(batch: int, length: int) -> list[list[int]]:
    return [[(7 * row + 3 * place) % 199 + 5 for place in range(length)] for row in range(batch)]


def _case(text: str) -> tuple[int, int, int]:
    try:
        batch, prompt, new = (int(part) for part in text.split(","))
        if min(batch, prompt, new) < 1:
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"--case {text!r} must be three numbers above zero: requests, prompt tokens, new tokens, such as 8,128,64",
            option="--case", value=text, expected="BATCH,PROMPT,NEW",
        ) from None  # fmt: skip
    return batch, prompt, new


def _default_shape(device: str) -> str:
    """The default, where it ends within minutes.

    :raises ConfigError: on a CPU, which is asked for billions of weights by name only.
    """
    if device == "cpu":
        raise ConfigError(
            f"the default shape {DEFAULT_SHAPE} would run for hours on a cpu, and torch finds no other device here; "
            "try --shape falcon-h1-tiny --case 2,8,4, or name a shape to run it all the same",
            option="--shape",
            value=None,
            expected=list(SHAPES),
        )
    return DEFAULT_SHAPE


def _named(case: tuple[int, int, int]) -> str:
    return ",".join(map(str, case))


def _wait(device: str) -> None:
    if device != "cpu":
        getattr(torch, device).synchronize()


def _release(device: str) -> None:
    """Give what is no longer held back to the device."""
    gc.collect()
    if device != "cpu":
        getattr(torch, device).empty_cache()


def _since_start() -> float:
    """Seconds since this process was started, imports included."""
    _wait(default_device())
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return uptime - ticks / 100  # USER_HZ is 100 wherever there is /proc


def _options() -> argparse.ArgumentParser:
    options = parser("launch", __doc__)
    options.add_argument("--shape", choices=SHAPES, help=f"whose shape (default {DEFAULT_SHAPE})")
    options.add_argument("--case", action="append", metavar="BATCH,PROMPT,NEW", help="repeatable; default: all")
    options.add_argument("--stock", type=int, default=256, metavar="BATCH", help="largest for generate (default 256)")
    options.add_argument("--tokens", type=positive, default=8192, help="max_num_batched_tokens (default 8192)")
    share = "share of the device's memory for weights, cache and attention kernels (default 0.8)"
    options.add_argument("--memory-fraction", type=float, default=0.8, metavar="SHARE", help=share)
    options.add_argument("--memory-bytes", type=positive, help="memory for the cache instead, in bytes")
    options.add_argument("--platform", help="platform: cpu, cuda, xpu or a plugin's (default: the best that probes)")
    options.add_argument("--backend", help="attention backend for every layer (default: the platform's choice)")
    options.add_argument("--mixer-backend", help="kernels of state layers (default: the platform's choice)")
    options.add_argument("--mamba-ssm-cache-dtype", help="dtype of recurrent states (default: the family's rule)")
    for name, what in (
        ("packed-steps", "one forward per step for all requests"),
        ("compile-layers", "compile decoder layers"),
        ("cuda-graphs", "replay steps of decodes as CUDA graphs"),
        ("async-scheduling", "prepare the next step while the device works"),
    ):
        options.add_argument(f"--{name}", choices=("on", "off"), help=f"{what} (default: the engine's choice)")
    return options


if __name__ == "__main__":
    run_main(main)
