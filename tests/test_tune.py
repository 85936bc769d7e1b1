"""What ``makeready bench tune`` chooses and writes, and how the kernels read it; the sweep itself runs on a device."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from makeready.attention_backends.flash.triton_kernels.configs import DecodeConfig, PrefillConfig, decode_config
from makeready.attention_backends.flash.triton_kernels.tuned import (
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
from makeready.benchmarks.attention_cases import Case
from makeready.cli import main
from makeready.device import DeviceFacts
from makeready.errors import ConfigError

pytest.importorskip("triton")
from makeready.benchmarks import tune

HERE = DeviceFacts(platform="cuda", device_type="cuda", name="Invented One", compute_capability=(9, 0))
OTHER = replace(HERE, name="Invented Two")
SLOW = DecodeConfig(tile=32, warps=2, stages=2, swap=False, programs=2)
FAST = DecodeConfig(tile=128, warps=8, stages=4, swap=True, programs=5)
FACTS = {"head_size": 128, "rows": 4, "narrow": False, "invariant": False, "max_model_len": 4096}
STEP = {
    "requests": 1, "queries": 4096, "keys": 4096, "block_size": 16, "causal": True, "narrow": False, "invariant": False,
    "max_model_len": 4096,
}  # fmt: skip


def entry(config=FAST, device="Invented One", **given):
    kind = "decode" if isinstance(config, DecodeConfig) else "prefill"
    rows = 16 if kind == "decode" else 4
    return Entry(
        **{
            "kind": kind, "device": device, "head_size": 128, "rows": rows, "config": config,
            "figures": {"a case": "1 us"}, "measured": "today", **given,
        }
    )  # fmt: skip


def case(name, kind="decode", heads=(32, 8), head_size=128):
    return Case(name, kind, ((1, 64),) * 2, heads, head_size, 16)


def measured(name, config, relative, **given):
    return tune.Measured(case(name, **given), config, 100 * relative, relative)


def test_the_lowest_geometric_mean_over_all_cases_is_chosen():
    found = [
        measured("a", None, 1.0), measured("b", None, 1.0),
        measured("a", SLOW, 0.5), measured("b", SLOW, 3.0),
        measured("a", FAST, 0.9), measured("b", FAST, 0.8),
    ]  # fmt: skip
    (chosen,) = tune.best(found, "Invented One", "today")
    assert chosen.config == FAST
    assert chosen.key == ("decode", "Invented One", 128, 16)
    assert set(chosen.figures) == {"a", "b"}
    assert chosen.figures["a"].startswith("90.0 us")


def test_a_candidate_that_failed_on_a_case_is_not_chosen():
    found = [measured("a", SLOW, 0.9), measured("b", SLOW, 0.9), measured("a", FAST, 0.1)]
    (chosen,) = tune.best(found, "Invented One", "today")
    assert chosen.config == SLOW
    assert tune.best([measured("a", None, 1.0)], "Invented One", "today") == ()


def test_what_is_hardly_faster_changes_nothing_unless_the_present_configuration_is_wrong():
    present, candidate = measured("a", None, 1.0), measured("a", FAST, 0.995)
    assert tune.best([present, candidate], "Invented One", "today") == ()
    (chosen,) = tune.best([candidate], "Invented One", "today")
    assert chosen.config == FAST


def test_questions_are_answered_apart():
    found = [measured("a", SLOW, 1.0), measured("c", FAST, 1.0, head_size=256), measured("d", FAST, 1.0, heads=(32, 1))]
    chosen = {entry.key[2:]: entry.config for entry in tune.best(found, "Invented One", "today")}
    assert chosen == {(128, 16): SLOW, (256, 16): FAST, (128, 32): FAST}


def test_a_table_survives_the_file_and_other_devices_keep_their_entries(tmp_path):
    path = tmp_path / "table.json"
    other = entry(SLOW, device="Invented Two")
    write_table((other, entry(SLOW)), path)
    write_table(merged(read_table(path), [entry(FAST)]), path)
    assert {line.key: line for line in read_table(path)} == {other.key: other, entry(FAST).key: entry(FAST)}


@pytest.mark.parametrize(
    "text", ["{}", "nonsense", '{"entries": [{"kind": "decode"}]}', '{"entries": [{"kind": "x"}]}']
)
def test_a_file_that_is_no_table_is_refused_by_name(tmp_path, text):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"table\.json is no table of kernel configurations"):
        read_table(path)


def test_no_file_is_an_empty_table_and_the_package_s_own_can_be_read(tmp_path):
    assert read_table(tmp_path / "gone.json") == ()
    assert all(isinstance(line, Entry) for line in read_table(TABLE))


def test_an_entry_serves_its_own_device_and_shape_alone():
    configs = Configs([entry(FAST)])
    assert configs.decode(HERE, **FACTS) == FAST
    for device, facts in (
        (OTHER, FACTS),
        (HERE, {**FACTS, "head_size": 64}),
        (HERE, {**FACTS, "rows": 64}),
        (HERE, {**FACTS, "narrow": True}),
        (HERE, {**FACTS, "invariant": True}),
    ):
        assert configs.decode(device, **facts) == decode_config(device, **facts)


def test_a_prefill_entry_serves_where_its_way_to_read_holds():
    copies = PrefillConfig(block_m=128, block_n=64, warps=4, stages=2, source="copies")
    configs = Configs([entry(copies)])
    assert configs.prefill(HERE, 128, 128, 4, **STEP) == copies
    for shape, given in (
        ((128, 128, 4), {"requests": STEP["queries"]}),
        ((128, 64, 4), {}),
        ((128, 128, 4), {"causal": False}),
        ((128, 128, 4), {"invariant": True}),
    ):
        assert configs.prefill(HERE, *shape, **{**STEP, **given}) != copies
    assert serves(copies, 4, 4096)
    assert not serves(copies, 4, 16)
    assert serves(replace(copies, source="pages"), 4, 16)
    assert not serves(replace(copies, block_m=8), 16, 4096)


def test_a_forced_configuration_answers_everything_of_its_kind():
    prefill = PrefillConfig(block_m=64, block_n=64, warps=4, stages=2, source="pages")
    assert Forced(FAST).decode(OTHER, **FACTS) == FAST
    assert Forced(FAST).prefill(HERE, 128, 128, 4, **STEP) == Configs().prefill(HERE, 128, 128, 4, **STEP)
    assert Forced(prefill).prefill(HERE, 64, 64, 1, **STEP) == prefill


def test_every_candidate_of_a_case_can_serve_it():
    for one in tune.CASES + tune.MORE_CASES:
        if one.kind == "prefill":
            group = one.heads[0] // one.heads[1]
            queries = sum(one.query_lens) // len(one.query_lens)
            assert all(serves(found, group, queries) for found in tune.candidates(one))
        assert padded(one.head_size) == tune.key_of(one)[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_device_tuning_is_refused_by_name(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "tune"])
    assert stopped.value.code == 2
    assert "tuning needs a device of type cuda or xpu" in capsys.readouterr().err


@pytest.mark.cuda
def test_a_sweep_writes_a_table_that_the_kernels_read(tmp_path, capsys):
    path = tmp_path / "table.json"
    with pytest.raises(SystemExit) as stopped:
        main([
            "bench", "tune", "--case", "decode 64 x 4k, 32/8/128, block 64", "--sample", "24", "--jobs", "1",
            "--repeats", "5", "--table", str(path), "--write", "--json",
        ])  # fmt: skip
    assert stopped.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert len([row for row in printed["rows"] if "us" in row]) > 3
    assert [found.to_dict() for found in read_table(path)] == printed["entries"]
    assert all(chosen["gain"] > 1 for chosen in printed["chosen"])
