"""Measures configurations of our Triton attention kernels on this device, and writes the table that they read.

Every candidate runs every case of its kind. It is compared with float32 attention first and timed by graph replay if it
is right; one that does not compile, needs more memory than a compute unit has, or is wrong is a row with its reason and
is never chosen. For each question that the table answers (decode or prefill, head size, query heads per KV head) the
candidate with the lowest geometric mean over its cases becomes the entry: of its time relative to what the present
table gives, replayed in turns with it. One that is not 1 % faster changes nothing: what the table has stays, as do the
entries of other devices.

    makeready bench tune                                  # measure and show; the table stays as it is
    makeready bench tune --write                          # and write the table of the installed package
    makeready bench tune --table mine.json --write        # or another file
    makeready bench tune --kind decode --case 32/8/128 --budget 120

It needs the device: without one it is refused. Candidates are compiled by --jobs processes at the same time first.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from makeready.attention_backends.flash.triton_kernels.configs import DecodeConfig, PrefillConfig
from makeready.attention_backends.flash.triton_kernels.tuned import (
    LEAST_ROWS,
    TABLE,
    Configs,
    Entry,
    Forced,
    merged,
    padded,
    read_table,
    serves,
    write_table,
)
from makeready.attention_backends.interface import AttentionCall, AttentionImpl, BuildRequest
from makeready.benchmarks.attention_cases import CASES, Case, Tensors, build, expected
from makeready.benchmarks.harness import (
    Report,
    difference,
    parser,
    positive,
    print_table,
    require_device,
    run_main,
    time_together,
)
from makeready.config import AttentionConfig
from makeready.device import DeviceFacts
from makeready.errors import ConfigError
from makeready.platforms.probing import probe_cuda, probe_xpu

Config = DecodeConfig | PrefillConfig
Run = Callable[[], torch.Tensor]
Key = tuple[str, int, int]
"""Kind, padded head size, rows: a question that the table answers for a device."""

TOLERANCE = 1e-2
"""Largest relative root-mean-square error of bfloat16 against float32."""
BUILT_IN = "table"
WORTH = 0.99
"""Times the present table's, below which a candidate takes its place."""
HOPELESS = 1.3
"""Times the present table's, from which a candidate is not measured to the end."""
DECODES: tuple[DecodeConfig, ...] = tuple(
    DecodeConfig(tile=tile, warps=warps, stages=stages, swap=swap, programs=programs)
    for tile, warps, stages, swap, programs in product((32, 64), (2, 4, 8), (2, 3, 4), (False, True), (1, 2, 3, 4))
)
PREFILLS: tuple[PrefillConfig, ...] = tuple(
    PrefillConfig(block_m=rows, block_n=keys, warps=warps, stages=stages, source=source)
    for rows, keys, warps, stages, source in product(
        (64, 128, 256), (64, 128), (4, 8), (2, 3, 4), ("pages", "gathered", "copies")
    )
    if rows * keys <= 256 * 64 or warps == 8
)
MORE_CASES = (
    Case("decode 64 x 4k, 32/8/64, block 16", "decode", ((1, 4096),) * 64, (32, 8), 64, 16),
    Case("decode 64 x 4k, 16/8/256, block 64", "decode", ((1, 4096),) * 64, (16, 8), 256, 64),
    Case("prefill 2 x 4k, 32/8/64, block 16", "prefill", ((4096, 4096),) * 2, (32, 8), 64, 16),
    Case("prefill 2 x 4k, 16/2/256, block 544", "prefill", ((4096, 4096),) * 2, (16, 2), 256, 544),
)
"""Beside the published anchors': the other head sizes."""


@dataclass(frozen=True)
class Measured:
    """One configuration on one case."""

    case: Case
    config: Config | None
    """``None`` for what the present table gives."""
    us: float
    relative: float
    """To the present table's configuration, replayed in turns; 1 for that itself."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweep; 1 if for some case nothing was right, the present table's configuration included."""
    asked = _options().parse_args(arguments)
    device = require_device("tuning", "cuda", "xpu")
    facts = {"cuda": probe_cuda, "xpu": probe_xpu}[device]().devices[0]
    present, cases = read_table(asked.table), _chosen(asked)
    report = Report("tune", asked, device=device)
    deadline = time.monotonic() + asked.budget
    if asked.jobs > 1:
        _compile_together(cases, facts, asked, deadline)
    found: list[Measured] = []
    for case in cases:
        found += _sweep(case, facts, present, asked, report, deadline)
    entries = best(found, facts.name, f"{report.environment['date'][:10]}, {_software(report.environment)}")
    _conclude(report, entries, found, asked.json)
    if asked.write and entries:
        write_table(merged(present, entries), asked.table)
    ran = {row["case"] for row in report.rows}
    return int(ran != {one.case.name for one in found})


def key_of(case: Case) -> Key:
    """The question of the table that ``case`` asks."""
    group = case.heads[0] // case.heads[1]
    return case.kind, padded(case.head_size), max(LEAST_ROWS, group) if case.kind == "decode" else group


def candidates(case: Case) -> list[Config]:
    """What is worth trying on ``case``."""
    if case.kind == "decode":
        return list(DECODES)
    group, queries = case.heads[0] // case.heads[1], sum(case.query_lens) // len(case.query_lens)
    return [config for config in PREFILLS if serves(config, group, queries)]


def best(found: Sequence[Measured], device: str, measured: str) -> tuple[Entry, ...]:
    """Per question the configuration with the lowest geometric mean of relative times.

    A configuration that lacks a case which another one ran is not taken: it was wrong there, or did not compile. None
    is taken that is not faster than the present table.
    """
    by_key: dict[Key, dict[Config | None, dict[str, Measured]]] = defaultdict(lambda: defaultdict(dict))
    for one in found:
        by_key[key_of(one.case)][one.config][one.case.name] = one
    entries = []
    for (kind, head_size, rows), by_config in by_key.items():
        names = {name for runs in by_config.values() for name in runs}
        whole = {config: runs for config, runs in by_config.items() if config is not None and runs.keys() == names}
        if not whole:
            continue
        mean = {
            config: math.exp(fmean(math.log(one.relative) for one in runs.values())) for config, runs in whole.items()
        }
        chosen = min(whole, key=mean.__getitem__)
        if mean[chosen] > WORTH and by_config[None].keys() == names:
            continue
        entries.append(
            Entry(
                kind=kind,
                device=device,
                head_size=head_size,
                rows=rows,
                config=chosen,
                figures={name: _figure(one) for name, one in sorted(whole[chosen].items())},
                measured=measured,
            )
        )
    return tuple(entries)


def _options() -> argparse.ArgumentParser:
    options = parser("tune", __doc__)
    options.add_argument("--kind", choices=("decode", "prefill"), help="only cases of this kind")
    options.add_argument("--case", action="append", metavar="TEXT", help="only cases whose name has TEXT in it")
    options.add_argument(
        "--table", type=Path, default=TABLE, metavar="FILE", help="table to compare with, and to write"
    )
    options.add_argument("--write", action="store_true", help="write the table when the sweep is done")
    options.add_argument("--budget", type=float, default=3600.0, metavar="S", help="stop sweeping after S seconds")
    options.add_argument("--jobs", type=positive, default=4, help="processes that compile (default 4)")
    options.add_argument("--sample", type=positive, metavar="N", help="only every N-th candidate, for a first look")
    return options


def _chosen(asked: argparse.Namespace) -> list[Case]:
    cases = [case for case in (*CASES, *MORE_CASES) if case.kind in ("decode", "prefill")]
    found = [
        case
        for case in cases
        if asked.kind in (None, case.kind) and (not asked.case or any(text in case.name for text in asked.case))
    ]
    if not found:
        raise ConfigError(
            f"no case has {' or '.join(map(repr, asked.case))} in its name",
            option="--case",
            value=asked.case,
            expected=[case.name for case in cases],
        )
    return found


def _sweep(
    case: Case, facts: DeviceFacts, present: Sequence[Entry], asked: argparse.Namespace, report: Report, deadline: float
) -> list[Measured]:
    """The present table's configuration, then every candidate, until the budget is spent."""
    device = torch.device(facts.device_type)
    tensors = build(case, device, torch.bfloat16, captured=False)
    reference = expected(tensors)
    present_run = _run(tensors, Configs(present), facts)
    found = []
    for config in (None, *candidates(case)[:: asked.sample or 1]):
        if time.monotonic() > deadline:
            break
        row: dict[str, Any] = {"case": case.name, "config": BUILT_IN if config is None else _words(config)}
        try:
            run = present_run if config is None else _run(tensors, Forced(config), facts)
            one = _measure(case, config, run, present_run, reference, asked.repeats, row)
        except Exception as error:  # a candidate that cannot run is a row, not the end of the sweep
            report.fail(error, **row)
            continue
        report.add(**row)
        if one is not None:
            found.append(one)
    del tensors, reference
    getattr(torch, facts.device_type).empty_cache()
    return found


def _measure(
    case: Case,
    config: Config | None,
    run: Run,
    present: Run,
    reference: torch.Tensor,
    repeats: int,
    row: dict[str, Any],
) -> Measured | None:
    """Fill ``row``; ``None`` for a configuration that is wrong."""
    row["rms_error"] = difference(run(), reference)["rms_error"]
    if not row["rms_error"] <= TOLERANCE:
        row["error"] = f"wrong: over {TOLERANCE:.0e} against float32"
        return None
    together = partial(time_together, {"": run, BUILT_IN: present}, device=reference.device.type)
    timings = together(repeats=min(3, repeats))
    if timings[""].median_us < HOPELESS * timings[BUILT_IN].median_us:
        timings = together(repeats=repeats)
    row["us"] = timings[""].median_us
    row["relative"] = 1.0 if config is None else row["us"] / timings[BUILT_IN].median_us
    one = Measured(case, config, row["us"], row["relative"])
    row["figure"] = _figure(one)
    return one


def _run(tensors: Tensors, configs: Configs, facts: DeviceFacts) -> Run:
    impl = _impl(tensors, configs, facts)
    call = AttentionCall(scale=tensors.case.head_size**-0.5)
    return partial(
        impl.forward, tensors.query, tensors.key_cache, tensors.value_cache, impl.prepare(tensors.step), call
    )


def _impl(tensors: Tensors, configs: Configs, facts: DeviceFacts) -> AttentionImpl:
    from makeready.attention_backends.flash.triton_kernels.impl import TritonImpl

    case = tensors.case
    request = BuildRequest(
        device=facts,
        spec=tensors.spec,
        dtype=tensors.spec.dtype,
        block_size=case.block_size,
        kernel_block_size=case.block_size,
        num_blocks=tensors.key_cache.shape[0],
        max_num_seqs=len(case.requests),
        max_num_batched_tokens=sum(case.query_lens),
        max_model_len=max(case.seq_lens),
        config=AttentionConfig(),
    )
    return TritonImpl(request, facts.compute_units or 1, configs)


def _compile_together(cases: Sequence[Case], facts: DeviceFacts, asked: argparse.Namespace, deadline: float) -> None:
    """Fill Triton's cache: each process runs its share of the candidates once, on a small step of the same shape."""
    work = [(_small(case), config, facts) for case in cases for config in candidates(case)[:: asked.sample or 1]]
    context = multiprocessing.get_context("spawn")
    with context.Pool(asked.jobs) as pool:
        pending = pool.map_async(_compile, work, chunksize=4)
        pending.wait(max(0.0, deadline - time.monotonic()) / 2)


def _small(case: Case) -> Case:
    """Few and short requests: what is compiled is the same."""
    tokens = 4 * case.block_size if case.kind == "decode" else 512
    return replace(case, requests=((1 if case.kind == "decode" else 512, tokens),) * 2)


def _compile(work: tuple[Case, Config, DeviceFacts]) -> None:
    case, config, facts = work
    tensors = build(case, torch.device(facts.device_type), torch.bfloat16, captured=False)
    try:
        _run(tensors, Forced(config), facts)()
    except Exception:  # it fails again where it is measured, and is shown there
        return


def _conclude(report: Report, entries: Sequence[Entry], found: Sequence[Measured], as_json: bool) -> None:
    """Show what was chosen beside the present table."""
    relative = {(one.case.name, one.config): one.relative for one in found}
    chosen = [
        {
            "kind": entry.kind,
            "head size": entry.head_size,
            "rows": entry.rows,
            "case": name,
            "chosen": _words(entry.config),
            "figure": figure,
            "gain": 1 / relative[name, entry.config],
        }
        for entry in entries
        for name, figure in entry.figures.items()
    ]
    report.conclusion = {"entries": [entry.to_dict() for entry in entries], "chosen": chosen}
    report.finish(table=False)
    if as_json:
        return
    if chosen:
        print_table("chosen, and the gain over the present table", chosen)
    kept = {key_of(one.case) for one in found} - {entry.key[:1] + entry.key[2:] for entry in entries}
    for kind, head_size, rows in sorted(kept):
        print(f"{kind}, head size {head_size}, rows {rows}: nothing was 1 % faster than the present table, which stays")


def _figure(one: Measured) -> str:
    if one.case.kind == "decode":
        return f"{one.us:.1f} us, {one.case.kv_bytes / one.us / 1e6:.2f} TB/s"
    return f"{one.us:.0f} us, {one.case.flops / one.us / 1e6:.0f} TFLOP/s"


def _words(config: Config) -> str:
    return " ".join(f"{name}={value}" for name, value in asdict(config).items())


def _software(environment: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in environment["software"].items())


if __name__ == "__main__":
    run_main(main)
