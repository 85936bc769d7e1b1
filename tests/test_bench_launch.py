"""The launch benchmark at a tiny shape: every row that it promises, on any machine."""

from __future__ import annotations

import json

import pytest

from makeready.benchmarks.launch import main
from makeready.errors import ConfigError


def test_it_measures_start_cases_steps_and_stock(tmp_path, capsys):
    out = tmp_path / "launch.json"
    options = ["--shape", "falcon-h1-tiny", "--case", "2,8,3", "--memory-bytes", "20000000", "--platform", "cpu"]
    assert main([*options, "--backend", "reference", "--packed-steps", "on", "--stock", "2", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["case"] for row in rows] == [
        "process start to first token", "2,8,3", "2,8,3 steps", "stock generate 2,8,3",
    ]  # fmt: skip
    assert rows[0]["s"] > rows[0]["model_s"]
    assert all(rows[index]["tokens_per_s"] > 0 for index in (1, 3))
    assert rows[1]["host_ms"] > 0
    assert "packed_steps: on" in rows[0]["execution"][0]


def test_a_case_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="--case '8,128' must be three numbers"):
        main(["--case", "8,128"])
