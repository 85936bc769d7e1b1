"""State mixers on pages: decodes against the memory's bandwidth, prefills against the products they need.

A decode must read and write every request's state once: TB/s counts that, beside what a large copy reaches on the same
device in the same run. A prefill's TFLOP/s count one update and one read of the state per token and no more; what a
chunked algorithm adds is its own affair. Every time is the median of graph replays (on CUDA), and the outputs and
states of the first requests are compared with the reference in float32.

    makeready bench mixers                                   # needs a GPU
    makeready bench mixers --only "decode 256" --out mixers.json
    makeready bench mixers --small --kernels reference       # seconds, on any machine
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from makeready.benchmarks.harness import Report, default_device, difference, parser, run_main, time_device
from makeready.benchmarks.mixer_cases import Case, batch_of, cases, runner, small_cases, tokens_of
from makeready.cache.allocation import torch_dtype
from makeready.device import DeviceFacts
from makeready.errors import BackendError
from makeready.hybrid.mixers.interface import MixerKernels
from makeready.hybrid.mixers.reference.kernels import ReferenceMixers
from makeready.plugins.manager import load_plugins

CHECKED = 2
"""Requests whose outputs and states are compared."""
TOLERANCE = 1e-2
"""Largest root-mean-square error against float32, relative: rounding of bfloat16."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if any case failed or was wrong."""
    options = parser("mixers", __doc__)
    known = "triton (default), fla, mamba-ssm, causal-conv1d, reference or a plugin's"
    options.add_argument("--kernels", default="triton", help=known)
    options.add_argument("--only", nargs="*", default=[], help="cases whose names contain one of these")
    options.add_argument("--small", action="store_true", help="one small case per mixer")
    asked = options.parse_args(arguments)
    device = default_device()
    kernels = _kernels(asked.kernels, device)
    report = Report("mixers", asked, device=device)
    torch.manual_seed(0)
    report.add(case="copy", tbps=round(_copy_bandwidth(device, 1 << 20 if asked.small else 1 << 30), 3))
    for case in small_cases() if asked.small else cases():
        if asked.only and not any(part in case.name for part in asked.only):
            continue
        try:
            report.add(**measure(kernels, case, device, repeats=asked.repeats))
        except Exception as error:  # a case that does not fit must not lose the others
            report.fail(error, case=case.name)
    return report.finish()


def measure(kernels: MixerKernels, case: Case, device: str, *, repeats: int) -> dict[str, object]:
    """One row: time, rate and error of a case.

    :raises BackendError: if the output is wrong.
    """
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    shape, tokens = case.shape, sum(case.lens)
    batch, run = batch_of(case, device), runner(shape, device)
    pages = torch.randn(len(case.lens) + 1, *shape.state, device=device).to(torch_dtype(case.state_dtype))
    given = tokens_of(shape, tokens, dtype, device)
    few = replace(
        batch,
        query_start=batch.query_start[: CHECKED + 1],
        slots=batch.slots[:CHECKED],
        fresh=batch.fresh[:CHECKED],
        query_lens_host=case.lens[:CHECKED],
    )
    seen = sum(case.lens[:CHECKED])
    wanted_pages = pages.float().clone()
    wanted = run(ReferenceMixers(), wanted_pages, few, {name: value[:seen].float() for name, value in given.items()})
    found = run(kernels, pages, batch, given)
    used = few.slots.tolist()
    errors = difference(found[:seen], wanted)
    state_error = difference(pages[used], wanted_pages[used])["rms_error"]
    if not max(errors["rms_error"], state_error) < TOLERANCE:
        raise BackendError(f"outputs differ from float32 by {errors['rms_error']:.2g}, states by {state_error:.2g}")
    pages.normal_()
    calls = 10 if case.decode and device == "cuda" else 1
    timing = time_device(lambda: run(kernels, pages, batch, given), device=device, repeats=repeats, calls=calls)
    row: dict[str, object] = {"case": case.name, "us": round(timing.median_us, 2), "how": timing.how}
    if case.decode:
        row["tbps"] = round(2 * pages[:1].nbytes * len(case.lens) / timing.median_us / 1e6, 3)
    elif shape.flops(tokens):
        row["tflops"] = round(shape.flops(tokens) / timing.median_us / 1e6, 2)
    else:
        row["tbps"] = round(2 * given["x"].nbytes / timing.median_us / 1e6, 3)
    return {**row, **errors, "state_rms_error": state_error}


def _kernels(name: str, device: str) -> MixerKernels:
    facts = DeviceFacts(platform=device, device_type=device)
    offered = {backend.name: backend for backend in load_plugins().mixer_backends(facts).backends}
    if name not in offered or not offered[name].capabilities(facts).dtypes:
        raise BackendError(
            f"mixer kernels {name!r} cannot be had on {device}; known are {', '.join(offered)}",
            option="--kernels",
            value=name,
            expected=list(offered),
        )
    return offered[name].build(facts)


def _copy_bandwidth(device: str, size: int) -> float:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / time_device(lambda: target.copy_(source), device=device).median_us / 1e6


if __name__ == "__main__":
    run_main(main)
