"""``makeready bench``: every benchmark is found and explains itself; the harness times, compares and writes."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch

from makeready.benchmarks.catalogue import benchmarks
from makeready.benchmarks.harness import Report, difference, parse_peers, parser, require_device, time_device
from makeready.cli import main
from makeready.errors import BackendError, ConfigError


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *arguments])
    code = stopped.value.code
    printed = capsys.readouterr()
    return int(code or 0), printed.out, printed.err


def test_every_benchmark_is_listed_with_its_summary(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert {"cold-start", "waste"} <= set(benchmarks())
    for name, found in benchmarks().items():
        assert name in out
        assert len(found.summary) > 20


@pytest.mark.parametrize("name", sorted(benchmarks()))
def test_every_benchmark_teaches(name, capsys):
    code, out, _ = run(capsys, name, "--help")
    assert code == 0
    assert f"usage: makeready bench {name}" in out
    assert "--json" in out


def test_an_unknown_benchmark_is_refused_by_name(capsys):
    code, _, err = run(capsys, "nonsense")
    assert code == 2
    assert "nonsense" in err


def test_a_benchmark_without_its_software_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "makeready.benchmarks.attention", None)  # as if it did not import
    code, _, err = run(capsys, "attention", "--small")
    assert code == 2
    assert "makeready bench attention needs makeready.benchmarks.attention, which is not installed (pip" in err


def test_rows_are_written_as_they_come_and_a_failed_case_does_not_end_the_run(tmp_path, capsys):
    out = tmp_path / "figures.json"
    asked = parser("trial", "What it measures.").parse_args(["--json", "--out", str(out), "--repeats", "3"])
    report = Report("trial", asked, device="cpu")
    a = torch.ones(4)
    timing = time_device(lambda: a + 1, device="cpu", repeats=asked.repeats)
    assert timing.repeats == 3
    assert timing.min_us <= timing.median_us <= timing.max_us
    report.add(case="one", us=timing.median_us, **difference(a + 1, a + 1))
    assert json.loads(out.read_text())["rows"][0]["max_error"] == 0
    report.fail(ValueError("no such kernel"), case="two")
    report.add(case="three", error_of=math.nan)
    assert report.finish() == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    assert printed["rows"][1]["error"] == "ValueError: no such kernel"
    assert printed["rows"][2]["error_of"] == "nan"
    assert printed["environment"]["device"]["type"] == "cpu"
    assert printed["environment"]["software"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]


def test_a_difference_is_relative_to_what_was_expected_and_nan_never_passes():
    expected = torch.full((8,), 2.0)
    assert difference(expected * 1.5, expected) == {"max_error": 1.0, "rms_error": 0.5}
    assert not difference(torch.tensor([1.0, math.nan]), torch.ones(2))["rms_error"] <= 1e9


def test_a_peer_is_a_name_and_a_folder(tmp_path):
    assert parse_peers([f"fa3={tmp_path}"]) == {"fa3": str(tmp_path)}
    for wrong in ("fa3", f"fa3={tmp_path}/gone"):
        with pytest.raises(ConfigError, match="NAME=FOLDER"):
            parse_peers([wrong])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_a_device_that_is_not_here_is_refused_by_name():
    with pytest.raises(BackendError, match="tuning needs a device of type cuda, and torch finds only cpu here"):
        require_device("tuning", "cuda")


@pytest.mark.cuda
def test_graph_replay_times_a_copy_within_reason():
    source = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    timing = time_device(lambda: target.copy_(source), repeats=20)
    assert timing.how == "graph replay"
    assert 0.5e12 < 2 * source.numel() / (timing.median_us * 1e-6) < 12e12
