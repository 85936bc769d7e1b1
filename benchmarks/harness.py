"""What the benchmarks share: where they ran, how they time, and how they write down what they found.

A benchmark is a module of this folder with ``main(arguments=None) -> int``; ``makeready bench NAME`` finds it. It takes
its options through :func:`parser`, times with :func:`time_device` (or :func:`time_wall`), compares with a reference
beside every time (:func:`difference`), and hands each row to a :class:`Report` as soon as it is measured, so that a run
that is cut short keeps what it has.

    asked = parser("attention", __doc__).parse_args(arguments)
    report = Report("attention", asked)
    timing = time_device(lambda: impl.forward(...), calls=4)
    report.add(case="decode 64 x 4k", us=timing.median_us, tbps=read / timing.median_us / 1e6, **difference(out, ref))
    return report.finish()
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from makeready import __version__
from makeready.errors import BackendError, ConfigError

if TYPE_CHECKING:
    import torch

L2_FLUSH_BYTES = 256 << 20
"""Written between repeats when asked to: more than the last-level cache of any device that we know."""
SOFTWARE = ("torch", "triton", "transformers", "numpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Microseconds of one call, over ``repeats`` measurements."""

    median_us: float
    min_us: float
    max_us: float
    repeats: int
    how: str
    """``graph replay``, ``events`` or ``wall``."""

    @classmethod
    def of(cls, us: Sequence[float], how: str) -> Timing:
        """From each repeat's microseconds."""
        return cls(median_us=statistics.median(us), min_us=min(us), max_us=max(us), repeats=len(us), how=how)


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Options that every benchmark has; a benchmark adds its own.

    :param description: the module's docstring, shown as it is written.
    """
    made = argparse.ArgumentParser(
        prog=f"makeready bench {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--json", action="store_true", help="print one JSON object instead of lines and a table")
    made.add_argument("--out", type=out_file, metavar="FILE", help="also write the JSON here, after every row")
    made.add_argument(
        "--repeats", type=positive, default=50, help="measurements per figure (default 50; the median counts)"
    )
    return made


def positive(text: str) -> int:
    """A whole number above zero, for argparse."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero")
    return int(text)


def out_file(text: str) -> Path:
    """A file in a folder that is there, for argparse: a benchmark must not fail when its first row is written."""
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        what = "is a folder" if path.is_dir() else f"cannot be written: the folder {path.parent} does not exist"
        raise argparse.ArgumentTypeError(f"{text!r} {what}")
    return path


def parse_peers(given: Sequence[str]) -> dict[str, str]:
    """``["fa3=/peers"]`` as ``{"fa3": "/peers"}``: a peer's name and the folder to import it from.

    :raises ConfigError: for a peer without a folder, or a folder that is not there.
    """
    peers = {}
    for text in given:
        name, sign, folder = text.partition("=")
        if not sign or not Path(folder).is_dir():
            raise ConfigError(
                f"--peer {text!r} must be NAME=FOLDER, and the folder must exist, such as fa3=/peers",
                option="--peer",
                value=text,
                expected="NAME=FOLDER",
            )
        peers[name] = folder
    return peers


def environment(device: str | None = None) -> dict[str, Any]:
    """Where and with what this runs. torch is asked only for a ``device`` such as ``cuda``."""
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "makeready": __version__,
        "python": platform.python_version(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "software": {name: version for name in SOFTWARE if (version := _version(name)) is not None},
    }
    return found if device is None else {**found, "device": _device_facts(device)}


def default_device() -> str:
    """``cuda`` or ``xpu`` where torch finds one, else ``cpu``."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "xpu" if hasattr(torch, "xpu") and torch.xpu.is_available() else "cpu"


def require_device(what: str, *allowed: str) -> str:
    """The device that is here, if it is one of ``allowed``.

    :raises BackendError: naming what was asked and what is here.
    """
    found = default_device()
    if found not in allowed:
        raise BackendError(
            f"{what} needs a device of type {' or '.join(allowed)}, and torch finds only {found} here",
            option="device",
            value=found,
            expected=list(allowed),
        )
    return found


def time_device(
    run: Callable[[], object],
    *,
    device: str = "cuda",
    repeats: int = 50,
    warmup: int = 3,
    calls: int = 1,
    graph: bool = True,
    flush: bool = False,
) -> Timing:
    """Microseconds that one call of ``run`` takes on the device.

    On CUDA the calls are captured in a graph and replayed between two events: what is measured is the device's work,
    not Python. Elsewhere, and with ``graph=False``, events (XPU) or the clock (CPU) are used.

    :param calls: calls per measurement, for work of less than some 20 us: one replay costs a few by itself.
    :param flush: overwrite the last-level cache before every measurement, for data that would stay in it.
    """
    if device == "cpu":
        return time_wall(run, repeats=repeats, warmup=warmup, calls=calls)
    import torch

    accelerator: Any = getattr(torch, device)
    for _ in range(warmup):
        run()
    accelerator.synchronize()
    captured = graph and device == "cuda"
    replay, how = (_captured(run, calls), "graph replay") if captured else (_repeated(run, calls), "events")
    scratch = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device) if flush else None
    replay()
    events = [(accelerator.Event(enable_timing=True), accelerator.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        if scratch is not None:
            scratch.zero_()
        start.record()
        replay()
        end.record()
    accelerator.synchronize()
    return Timing.of([1e3 * start.elapsed_time(end) / calls for start, end in events], how)


def time_together(
    runs: Mapping[str, Callable[[], object]],
    *,
    device: str = "cuda",
    repeats: int = 50,
    warmup: int = 3,
) -> dict[str, Timing]:
    """As :func:`time_device` of each, in turns: one replay of every run, then the next of every run.

    A device that is at its power limit slows down as a run goes on (an H200 by 5 to 10 % within a second of prefill),
    so that of two figures taken one after the other the second is the worse one. In turns both meet the same clocks.
    """
    import torch

    if device == "cpu":
        return {name: time_wall(run, repeats=repeats, warmup=warmup) for name, run in runs.items()}
    accelerator: Any = getattr(torch, device)
    for run in runs.values():
        for _ in range(warmup):
            run()
    accelerator.synchronize()
    captured = device == "cuda"
    replays = {name: _captured(run, 1) if captured else _repeated(run, 1) for name, run in runs.items()}
    spans: dict[str, list[tuple[Any, Any]]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, replay in replays.items():
            start, end = accelerator.Event(enable_timing=True), accelerator.Event(enable_timing=True)
            start.record()
            replay()
            end.record()
            if turn:  # the first replay of a graph uploads it
                spans[name].append((start, end))
    accelerator.synchronize()
    how = "graph replay, in turns" if captured else "events, in turns"
    return {
        name: Timing.of([1e3 * start.elapsed_time(end) for start, end in found], how) for name, found in spans.items()
    }


def time_wall(run: Callable[[], object], *, repeats: int = 50, warmup: int = 3, calls: int = 1) -> Timing:
    """Microseconds of one call by the host's clock, for work that ends when the call returns."""
    for _ in range(warmup):
        run()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        found.append(1e6 * (time.perf_counter() - start) / calls)
    return Timing.of(found, "wall")


def difference(output: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """``max_error`` (absolute) and ``rms_error`` (root mean square, relative to the expected values'), in float32.

    Non-finite values anywhere in ``output`` give NaN, which no tolerance accepts.
    """
    off, real = output.float() - expected.float(), expected.float()
    scale = float(real.square().mean().sqrt())
    return {
        "max_error": float(off.abs().max()),
        "rms_error": float(off.square().mean().sqrt()) / scale if scale else float(off.abs().max()),
    }


class Report:
    """Rows as they are measured: a line each at once, the file rewritten each time, a table or JSON at the end.

    :param asked: the parsed options of :func:`parser`.
    :param device: as :func:`environment` takes it.
    """

    def __init__(self, name: str, asked: argparse.Namespace, *, device: str | None = None) -> None:
        self.name = name
        self.environment = environment(device)
        self.rows: list[dict[str, Any]] = []
        self.conclusion: dict[str, Any] = {}
        """What follows from the rows, JSON-ready; written beside them."""
        self._as_json: bool = asked.json
        self._out: Path | None = asked.out
        if not self._as_json:
            print(f"{name}: {_one_line(self.environment)}", flush=True)

    def add(self, **row: Any) -> None:
        """One measurement: names and JSON-ready values, the case first."""
        self.rows.append(row)
        if not self._as_json:
            print("  " + "  ".join(f"{key} {_shown(value)}" for key, value in row.items()), flush=True)
        self._write()

    def fail(self, error: Exception, **row: Any) -> None:
        """A case that did not run: its row says why, and the run goes on."""
        self.add(**row, error=f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")

    def to_dict(self) -> dict[str, Any]:
        """Everything so far, JSON-ready; numbers that are not finite become strings."""
        found = {"benchmark": self.name, "environment": self.environment, "rows": [_plain(row) for row in self.rows]}
        return {**found, **self.conclusion} if self.conclusion else found

    def finish(self, *, table: bool = True) -> int:
        """Print the whole; the exit code: 1 if any row failed.

        :param table: false leaves out the table of the rows.
        """
        self._write()
        if self._as_json:
            print(json.dumps(self.to_dict(), indent=2, allow_nan=False))
        elif table:
            print_table(self.name, self.rows)
        return int(any("error" in row for row in self.rows))

    def _write(self) -> None:
        if self._out is None:
            return
        partial = self._out.with_name(self._out.name + ".partial")
        partial.write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")
        partial.replace(self._out)


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as a table; columns in the order in which they first appear, without those that hold more than one value."""
    from rich.table import Table

    from makeready.report import make_console

    several = {key for row in rows for key, value in row.items() if isinstance(value, (dict, list, tuple))}
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in several]
    table = Table(title=title, title_justify="left")
    for column in columns:
        numbers = all(isinstance(row.get(column, 0), (int, float)) for row in rows)
        table.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_shown(row[column]) if column in row else "" for column in columns))
    make_console().print(table)


def run_main(main: Callable[[Sequence[str] | None], int]) -> None:
    """For ``if __name__ == "__main__"``: exits with the benchmark's code; bad input is one sentence."""
    from makeready.errors import MakereadyError

    try:
        sys.exit(main(None))
    except MakereadyError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _captured(run: Callable[[], object], calls: int) -> Callable[[], None]:
    """A CUDA graph of ``calls`` calls; what they return is kept, so that its memory is not handed out again."""
    import torch

    cuda: Any = torch.cuda
    side = cuda.Stream()
    side.wait_stream(cuda.current_stream())
    with cuda.stream(side):
        run()
    cuda.current_stream().wait_stream(side)
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        kept = [run() for _ in range(calls)]

    def replay(_kept: list[object] = kept) -> None:
        graph.replay()

    return replay


def _repeated(run: Callable[[], object], calls: int) -> Callable[[], None]:
    def repeat() -> None:
        for _ in range(calls):
            run()

    return repeat


def _device_facts(device: str) -> dict[str, Any]:
    import torch

    if device == "cpu":
        return {"type": "cpu", "name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    found = getattr(torch, device).get_device_properties(0)
    facts: dict[str, Any] = {"type": device, "name": found.name, "memory_bytes": found.total_memory}
    if device == "cuda":
        facts |= {
            "compute_capability": [found.major, found.minor],
            "compute_units": found.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return facts


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _one_line(found: Mapping[str, Any]) -> str:
    device = found["device"]["name"] if "device" in found else found["machine"]
    software = ", ".join(f"{name} {version}" for name, version in found["software"].items())
    return f"{device}, makeready {found['makeready']}, Python {found['python']}, {software}, {found['date']}"


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        return str(value) if isinstance(value, float) and value - value != 0 else value

    return {key: plain(value) for key, value in row.items()}
