"""Attention backends over the paged cache, each beside float32 and beside an installed peer, in one run.

Decode is given as the bandwidth of the K and V that must be read once, prefill and mixed steps as TFLOP/s. Every time
is the median of graph replays (on CUDA), and the output of the timed call is compared with float32 attention. `ratio`
is the peer's time over ours, both replayed in turns so that they meet the same clocks: 1 is as fast as the peer.

    makeready bench attention --backend flash --backend flex
    makeready bench attention --backend flash --provider triton --peer fa3=/peers --out attention.json
    makeready bench attention --small --backend reference          # seconds, on any machine

The peer `fa3` is FlashAttention 3 as a module `fa3_peer` in the folder given.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from makeready.attention_backends.flash.backend import FlashBackend
from makeready.attention_backends.flex.backend import FlexBackend
from makeready.attention_backends.interface import AttentionBackend, AttentionCall, AttentionImpl, BuildRequest
from makeready.attention_backends.reference.backend import ReferenceBackend
from makeready.benchmarks.attention_cases import CASES, DTYPES, SMALL, Case, Tensors, build, expected
from makeready.benchmarks.harness import (
    Report,
    Timing,
    default_device,
    difference,
    parse_peers,
    parser,
    run_main,
    time_device,
    time_together,
)
from makeready.config import AttentionConfig
from makeready.device import DeviceFacts
from makeready.errors import BackendError, ConfigError
from makeready.platforms.kernel_blocks import kernel_block_size
from makeready.platforms.probing import probe_cpu, probe_cuda, probe_xpu

BACKENDS: dict[str, type[AttentionBackend]] = {
    "flash": FlashBackend,
    "flex": FlexBackend,
    "reference": ReferenceBackend,
}
TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-4}
"""Largest root-mean-square error against float32, relative: rounding of the dtype, with room for P's."""
PEERS = ("fa3",)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if any case failed or was wrong."""
    asked = _options().parse_args(arguments)
    device = asked.device or default_device()
    _require_time(asked, device)
    facts = _facts(device)
    peers = parse_peers(asked.peer)
    _check_names(peers)
    _check_provider(asked, facts)
    report = Report("attention", asked, device=device)
    for case in _chosen(asked):
        _run_case(case, asked, facts, peers, report)
    return report.finish()


def _require_time(asked: argparse.Namespace, device: str) -> None:
    """The cases are made for a GPU: on a CPU they run when they, or it, are asked for by name.

    :raises ConfigError: with what ends within seconds.
    """
    if device == "cpu" and not (asked.small or asked.case or asked.device):
        raise ConfigError(
            "the cases are made for a GPU and take minutes each on a cpu, and torch finds no other device here; try "
            "--small --backend reference, or --device cpu to run them all the same",
            option="--device",
            value=device,
            expected=["--small", "--case TEXT", "--device cpu"],
        )


def _options() -> argparse.ArgumentParser:
    options = parser("attention", __doc__)
    options.add_argument(
        "--backend", action="append", choices=sorted(BACKENDS), help="backend to time; may be repeated (default flash)"
    )
    options.add_argument("--provider", help="flash: whose kernels (default: the first that can serve)")
    options.add_argument(
        "--peer", action="append", default=[], metavar="NAME=FOLDER", help="peer to time in the same run: fa3=FOLDER"
    )
    options.add_argument("--case", action="append", metavar="TEXT", help="only cases whose name has TEXT in it")
    options.add_argument("--small", action="store_true", help="small cases, to try the benchmark itself")
    options.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16", help="dtype of all tensors")
    options.add_argument("--device", choices=("cpu", "cuda", "xpu"), help="default: the accelerator that torch finds")
    options.add_argument(
        "--batch-invariant", action="store_true", help="time each backend's batch-invariant mode beside the ordinary"
    )
    return options


def _run_case(case: Case, asked: argparse.Namespace, facts: DeviceFacts, peers: dict[str, str], report: Report) -> None:
    device, dtype = torch.device(facts.device_type), DTYPES[asked.dtype]
    captured = case.kind == "decode" and device.type == "cuda"
    tensors = build(case, device, dtype, captured=captured)
    reference = expected(tensors)
    rivals: dict[str, Callable[[], torch.Tensor]] = {}
    for name, folder in peers.items():
        row: dict[str, Any] = {"case": case.name, "who": name}
        try:
            run = _fa3(folder, tensors)
            _time(run, tensors, reference, asked, report, row, {})
            rivals[name] = run
        except Exception as error:
            report.fail(error, **row)
    modes = (False, True) if asked.batch_invariant else (False,)
    for name in asked.backend or ["flash"]:
        for invariant in modes:
            who = name + (f" ({asked.provider})" if asked.provider and name == "flash" else "")
            row = {"case": case.name, "who": who + (", batch invariant" if invariant else "")}
            try:
                _time_backend(name, invariant, tensors, reference, facts, asked, report, row, rivals)
            except Exception as error:  # one backend that cannot serve a case does not end the run
                report.fail(error, **row)
    del tensors, reference
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _time_backend(
    name: str,
    invariant: bool,
    tensors: Tensors,
    reference: torch.Tensor,
    facts: DeviceFacts,
    asked: argparse.Namespace,
    report: Report,
    row: dict[str, Any],
    rivals: dict[str, Callable[[], torch.Tensor]],
) -> None:
    impl = _impl(name, invariant, tensors, facts, asked.provider)
    start = time.perf_counter()
    metadata = impl.prepare(tensors.step)
    call = AttentionCall(scale=tensors.case.head_size**-0.5)
    forward = partial(impl.forward, tensors.query, tensors.key_cache, tensors.value_cache, metadata, call)
    forward()
    if facts.device_type == "cuda":
        torch.cuda.synchronize()
    row["first_call_s"] = time.perf_counter() - start
    prepare = partial(impl.prepare, tensors.step)
    graph = tensors.step.captured and impl.capturable
    timing = time_device(prepare, device=facts.device_type, repeats=asked.repeats, graph=graph)
    row["prepare_us"] = timing.median_us
    _time(forward, tensors, reference, asked, report, row, rivals)


def _time(
    run: Callable[[], torch.Tensor],
    tensors: Tensors,
    reference: torch.Tensor,
    asked: argparse.Namespace,
    report: Report,
    row: dict[str, Any],
    rivals: dict[str, Callable[[], torch.Tensor]],
) -> float:
    """Time ``run``, in turns with the rivals, and add its row; the median in microseconds."""
    case = tensors.case
    found = difference(run(), reference)
    timings = time_together({"": run, **rivals}, device=tensors.query.device.type, repeats=asked.repeats)
    timing: Timing = timings.pop("")
    us = timing.median_us
    row["us"] = us
    if case.kind == "decode":
        row["TB_s"] = case.kv_bytes * tensors.query.element_size() / 2 / us / 1e6
    else:
        row["TFLOP_s"] = case.flops / us / 1e6
    for rival, against in timings.items():
        row[f"ratio_{rival}"] = against.median_us / us
    row |= {"rms_error": found["rms_error"], "how": timing.how}
    if not found["rms_error"] <= TOLERANCE[asked.dtype]:
        row["error"] = f"wrong: rms error {found['rms_error']:.2e} against float32, over {TOLERANCE[asked.dtype]:.0e}"
    report.add(**row)
    return us


def _impl(name: str, invariant: bool, tensors: Tensors, facts: DeviceFacts, provider: str | None) -> AttentionImpl:
    case, backend = tensors.case, BACKENDS[name]()
    asked: dict[str, Any] = {"flash_provider": provider} if provider and name == "flash" else {}
    config = AttentionConfig(batch_invariant=invariant, **asked)
    capabilities = backend.capabilities(facts)
    if invariant and not capabilities.batch_invariant:
        raise BackendError(f"{name} on {facts.device_type} has no batch-invariant mode", option="batch_invariant")
    return backend.build(
        BuildRequest(
            device=facts,
            spec=tensors.spec,
            dtype=tensors.spec.dtype,
            block_size=case.block_size,
            kernel_block_size=kernel_block_size(capabilities, case.block_size),
            num_blocks=tensors.key_cache.shape[0],
            max_num_seqs=len(case.requests),
            max_num_batched_tokens=sum(case.query_lens),
            max_model_len=max(case.seq_lens),
            config=config,
        )
    )


def _fa3(folder: str, tensors: Tensors) -> Callable[[], torch.Tensor]:
    """FlashAttention 3 over the same pages and the same block table."""
    if folder not in sys.path:
        sys.path.insert(0, str(Path(folder)))
    flash: Any = importlib.import_module("fa3_peer.flash_attn_interface").flash_attn_varlen_func
    case, step = tensors.case, tensors.step
    out = torch.empty_like(tensors.query)

    def run() -> torch.Tensor:
        flash(
            tensors.query,
            tensors.key_cache,
            tensors.value_cache,
            max(case.query_lens),
            step.query_start,
            max(case.seq_lens),
            seqused_k=step.seq_lens,
            softmax_scale=case.head_size**-0.5,
            causal=True,
            block_table=step.block_table,
            out=out,
            fa_version=3,
        )
        return out

    return run


def _facts(device: str) -> DeviceFacts:
    probe = {"cpu": probe_cpu, "cuda": probe_cuda, "xpu": probe_xpu}[device]()
    if not probe.devices:
        raise BackendError(probe.reason, option="--device", value=device, expected="a device that is here")
    return probe.devices[0]


def _chosen(asked: argparse.Namespace) -> list[Case]:
    cases = SMALL if asked.small else CASES
    found = [case for case in cases if not asked.case or any(text in case.name for text in asked.case)]
    if not found:
        raise ConfigError(
            f"no case has {' or '.join(map(repr, asked.case))} in its name",
            option="--case",
            value=asked.case,
            expected=[case.name for case in cases],
        )
    return found


def _check_names(peers: dict[str, str]) -> None:
    for name in peers:
        if name not in PEERS:
            raise ConfigError(
                f"peer {name!r} is not known; known: {', '.join(PEERS)}",
                option="--peer",
                value=name,
                expected=list(PEERS),
            )


def _check_provider(asked: argparse.Namespace, facts: DeviceFacts) -> None:
    """Before any case is built: a provider that is not there, or that no backend of the run would ask."""
    if not asked.provider:
        return
    FlashBackend().configured(AttentionConfig(flash_provider=asked.provider), facts)
    if asked.backend and "flash" not in asked.backend:
        raise ConfigError(
            f"--provider {asked.provider} says whose kernels flash runs, and only {', '.join(asked.backend)} is timed; "
            "add --backend flash or leave --provider out",
            option="--provider",
            value=asked.provider,
            expected="--backend flash",
        )


if __name__ == "__main__":
    run_main(main)
