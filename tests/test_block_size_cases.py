"""What vLLM 0.33.0's planning code answers, case by case."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from check_block_size_cases import (
    BOTH_REFUSE,
    MAMBA_REFUSED,
    MAMBA_RESPECTED,
    PAGES_EQUAL,
    SSM_DTYPE_UNUSED,
    USER_REFUSED,
    check_cases,
    load_cases,
    main,
    plan_case,
)
from makeready.errors import UnsupportedModelError
from makeready.hybrid.model_specs import read_model

FILE = Path(__file__).parent / "data" / "block_size_cases.json.gz"
CASES = load_cases(FILE)
TAGS = sorted({case["tag"] for case in CASES})


@pytest.mark.parametrize("tag", TAGS)
def test_all_cases_agree(tag: str) -> None:
    report = check_cases([case for case in CASES if case["tag"] == tag])
    assert report.total > 0
    assert dict(report.differences) == {}


def test_rules_of_disagreement_apply_where_they_are_meant_to() -> None:
    found = {tag: set(check_cases([c for c in CASES if c["tag"] == tag]).rules) for tag in TAGS}
    assert found["base"] <= {BOTH_REFUSE}
    assert found["user_block"] == {USER_REFUSED}
    assert found["user_mamba_block"] == {BOTH_REFUSE, USER_REFUSED, MAMBA_REFUSED, MAMBA_RESPECTED}
    assert found["xpu_triton"] <= {PAGES_EQUAL}
    assert found["ssm_dtype"] == {SSM_DTYPE_UNUSED}
    assert not found["nvfp4"] | found["flashinfer"] | found["spec_decode"] | found["gdn_flashinfer_ckpt64"]


def test_planning_twice_changes_nothing() -> None:
    for case in CASES[::400]:
        if not case["error"] and case["tag"] == "base":
            assert plan_case(case).to_dict() == plan_case(case).to_dict()


def test_what_no_engine_can_serve_is_refused_by_name() -> None:
    unservable = json.loads(gzip.decompress(FILE.read_bytes()))["unservable"]
    assert unservable
    for model, tp, why in unservable:
        what = "mamba2 n_groups" if "n_groups" in why else "attention heads"
        with pytest.raises(UnsupportedModelError, match=f"{what} .* tensor_parallel_size {tp}"):
            read_model(model, engine="vllm", tensor_parallel_size=tp)


def test_the_checker_finds_a_wrong_number(tmp_path, capsys) -> None:
    wrong = json.loads(json.dumps([case for case in CASES if case["tag"] == "base"][:3]))
    wrong[1]["output"]["block_size"] += 16
    file = tmp_path / "cases.json"
    file.write_text(json.dumps(wrong), encoding="utf-8")
    assert main([str(file)]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "base: 1 differ"
    assert printed[-1] == "2 of 3 agree"
