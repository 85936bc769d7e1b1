"""Wall time of whole commands, cold, and of a decision once everything is imported.

Each run is a new process, imports included, of the interpreter that runs this file; correctness is checked beside
every time. `makeready plan` has to answer in under 0.5 s on 2 cores, and a decision in under 5 ms once imported.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import makeready
from makeready.benchmarks.harness import out_file, positive, run_main
from makeready.hybrid.presets import preset_names
from makeready.plugins.manager import load_plugins

MODEL = "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import makeready": ["-c", "import makeready"],
    "makeready plan": ["-m", "makeready.cli", "plan", MODEL, "--platform", "xpu"],
    "makeready plan --json": ["-m", "makeready.cli", "plan", MODEL, "--platform", "xpu", "--json"],
}


def timed(arguments: list[str], runs: int) -> list[float]:
    """Seconds of each run."""
    found = []
    for _ in range(runs):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)
        found.append(time.perf_counter() - start)
        if "plan" in arguments and "2112" not in done.stdout:
            raise SystemExit(f"wrong answer:\n{done.stdout}")
    return found


def decision_ms() -> list[float]:
    """Milliseconds of `makeready.plan` per preset, once everything is imported and plugins are loaded."""
    plugins = load_plugins()
    makeready.plan(MODEL, platform="xpu", plugins=plugins)
    found = []
    for name in preset_names():
        start = time.perf_counter()
        makeready.plan(name, platform="cuda", plugins=plugins)
        found.append(1e3 * (time.perf_counter() - start))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="makeready bench cold-start", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=positive, default=15, help="processes per command")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=out_file, metavar="FILE", help="also write the JSON here")
    options = parser.parse_args(arguments)
    times = {name: timed(arguments, options.runs) for name, arguments in COMMANDS.items()}
    decisions = decision_ms()
    result: dict[str, Any] = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "makeready": makeready.__version__,
        "seconds": {
            name: {"min": min(found), "median": statistics.median(found), "max": max(found)}
            for name, found in times.items()
        },
        "plan_call_ms": {"presets": len(decisions), "median": statistics.median(decisions), "max": max(decisions)},
    }
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    if options.json:
        print(json.dumps(result, indent=2))
        return 0
    for name, figures in result["seconds"].items():
        print(f"{name:24} {figures['min']:.3f} / {figures['median']:.3f} / {figures['max']:.3f} s (min / median / max)")
    calls = result["plan_call_ms"]
    print(f"makeready.plan, imported: {calls['median']:.2f} ms median, {calls['max']:.2f} ms at most")
    return 0


if __name__ == "__main__":
    run_main(main)
