"""The attention benchmark: correctness stands beside each time, and what cannot be served is a row that says so."""

import json

import pytest
import torch

from makeready.attention_backends.reference.impl import ReferenceAttention
from makeready.benchmarks import attention
from makeready.benchmarks.attention_cases import CASES, SMALL, build, expected
from makeready.errors import BackendError, ConfigError


def run(tmp_path, *arguments):
    out = tmp_path / "attention.json"
    code = attention.main(["--small", "--repeats", "2", "--dtype", "float32", "--out", str(out), *arguments])
    return code, json.loads(out.read_text())["rows"]


def test_every_row_has_a_time_and_an_error_against_float32(tmp_path):
    code, rows = run(tmp_path, "--backend", "reference", "--device", "cpu")
    assert code == 0
    assert [row["case"] for row in rows] == [case.name for case in SMALL]
    assert all(row["us"] > 0 and row["rms_error"] < 1e-5 for row in rows)


def test_a_wrong_result_is_an_error_beside_its_time(tmp_path, monkeypatch):
    right = ReferenceAttention.forward
    monkeypatch.setattr(ReferenceAttention, "forward", lambda *given: right(*given) * 1.01)
    code, rows = run(tmp_path, "--backend", "reference", "--device", "cpu", "--case", "decode")
    assert code == 1
    assert "wrong: rms error 1.00e-02" in rows[0]["error"]


def test_a_backend_that_cannot_serve_is_a_row_with_its_reason(tmp_path):
    code, rows = run(tmp_path, "--backend", "flash", "--device", "cpu", "--case", "decode")
    assert code == 1
    assert "flash" in rows[0]["error"]


def test_unknown_cases_and_peers_are_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="no case has 'decoding' in its name"):
        run(tmp_path, "--case", "decoding")
    with pytest.raises(ConfigError, match="peer 'fa9' is not known; known: fa3"):
        run(tmp_path, "--peer", f"fa9={tmp_path}")


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_the_expected_output_agrees_with_torch(case):
    tensors = build(case, torch.device("cpu"), torch.float32, captured=False)
    start, group = 0, case.heads[0] // case.heads[1]
    for row, (count, length) in enumerate(case.requests):
        blocks = tensors.step.block_table[row, : -(-length // case.block_size)].long()
        keys, values = (
            cache[blocks].flatten(0, 1)[:length].transpose(0, 1).repeat_interleave(group, 0)
            for cache in (tensors.key_cache, tensors.value_cache)
        )
        query = tensors.query[start : start + count].transpose(0, 1)
        mask = torch.ones(count, length, dtype=torch.bool).tril(length - count)
        output = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        torch.testing.assert_close(expected(tensors)[start : start + count], output.transpose(0, 1))
        start += count


def test_the_counts_of_the_published_anchors():
    """967 us at 569 TFLOP/s, and 257 us at 4.18 TB/s, are what the anchors say of these cases."""
    cases = {case.name: case for case in CASES}
    assert cases["prefill 1 x 8k, 32/8/128, block 16"].flops / 967e-6 == pytest.approx(569e12, rel=0.01)
    assert cases["decode 64 x 4k, 32/8/128, block 16"].kv_bytes / 257e-6 == pytest.approx(4.18e12, rel=0.01)
    mixed = cases["mixed 2k chunk at 16k and 32 decodes at 4k, 32/8/128, block 16"]
    assert mixed.flops / 1027e-6 == pytest.approx(504e12, rel=0.01)


def test_a_provider_that_nobody_would_ask_is_refused_before_any_case_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "build", lambda *_, **__: pytest.fail("a case was built"))
    with pytest.raises(BackendError, match="flash_provider 'nope' is not known; for cpu there are"):
        run(tmp_path, "--device", "cpu", "--provider", "nope")
    with pytest.raises(ConfigError, match="--provider ipex says whose kernels flash runs, and only reference is timed"):
        run(tmp_path, "--device", "cpu", "--backend", "reference", "--provider", "ipex")
