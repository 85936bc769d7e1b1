"""Writing K and V of a step into the paged cache, beside a device-to-device copy of the same bytes.

`of_copy` is the copy's time over ours: 1 is as fast as a copy. Bytes are read once and written once. The tokens are
rotated among several inputs, so that they come from memory; slots lie in blocks of random order, and what was written
is read back and compared.

    makeready bench kv-write
    makeready bench kv-write --tokens 8192 --kv-dtype fp8_e4m3 --rotary
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch

from makeready.benchmarks.harness import Report, difference, parser, positive, require_device, run_main, time_device
from makeready.cache.write import rotate, write_kv

SHAPES = ((8, 128), (2, 128), (2, 256), (8, 64))
"""KV heads and head size."""
BLOCK_SIZE = 16
INPUTS = 4
"""Sets of tokens that are written in turn."""
KV_DTYPES = {"bfloat16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
TOLERANCE = {"bfloat16": 0.0, "fp8_e4m3": 0.04, "fp8_e5m2": 0.08}
"""Root mean square error that the stored dtype's rounding explains, without rotary."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if any case failed or was wrong."""
    asked = _options().parse_args(arguments)
    device = require_device("the K/V write benchmark", "cuda")
    report = Report("kv-write", asked, device=device)
    for heads, head_size in SHAPES:
        for tokens in asked.tokens or (8192, 2048, 256):
            row = {"case": f"{tokens} tokens x {heads} heads x {head_size}", "kv_dtype": asked.kv_dtype}
            try:
                _run(tokens, heads, head_size, asked, report, row)
            except Exception as error:  # one case that fails does not end the run
                report.fail(error, **row)
    return report.finish()


def _options() -> argparse.ArgumentParser:
    options = parser("kv-write", __doc__)
    options.add_argument("--tokens", type=positive, action="append", help="tokens of a step; may be repeated")
    options.add_argument("--kv-dtype", choices=sorted(KV_DTYPES), default="bfloat16", help="dtype of the cache")
    options.add_argument("--rotary", action="store_true", help="turn K on its way")
    return options


def _run(
    tokens: int, heads: int, head_size: int, asked: argparse.Namespace, report: Report, row: dict[str, str]
) -> None:
    device, stored = torch.device("cuda"), KV_DTYPES[asked.kv_dtype]
    blocks = max(4096, 2 * tokens // BLOCK_SIZE)
    pages = torch.zeros(blocks, BLOCK_SIZE, 2 * heads, head_size, dtype=stored, device=device)
    key_cache, value_cache = pages[:, :, :heads], pages[:, :, heads:]
    key, value = (torch.randn(INPUTS, tokens, heads, head_size, device=device).bfloat16() for _ in range(2))
    angles = torch.rand(tokens, head_size // 2, device=device) * 6.28
    rotary = (angles.cos(), angles.sin()) if asked.rotary else None
    handed_out = torch.randperm(blocks, device=device)[: -(-tokens // BLOCK_SIZE)]
    slots = (handed_out[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device=device)).flatten()[:tokens]

    def write(index: int) -> None:
        write_kv(key[index], value[index], key_cache, value_cache, slots, rotary=rotary)

    moved = key[0].numel() * 2 * (key.element_size() + pages.element_size())
    source = torch.randn(INPUTS, moved // 4, device=device).bfloat16()
    target = torch.empty_like(source)
    copied = time_device(_in_turn(lambda index: target[index].copy_(source[index])), repeats=asked.repeats)
    written = time_device(_in_turn(write), repeats=asked.repeats)
    wrong = difference(key_cache.flatten(0, 1)[slots].float(), rotate(key[-1], *rotary) if rotary else key[-1])
    wrong_value = difference(value_cache.flatten(0, 1)[slots].float(), value[-1])
    us = written.median_us / INPUTS
    worst = max(wrong["rms_error"], wrong_value["rms_error"])
    figures = {
        "us": us, "tbps": moved / us / 1e6, "of_copy": copied.median_us / written.median_us, "rms_error": worst
    }  # fmt: skip
    if not worst <= TOLERANCE[asked.kv_dtype] + (1e-2 if asked.rotary else 0.0):
        report.add(**row, **figures, error="what was read back is not what was written")
        return
    report.add(**row, **figures)


def _in_turn(run: Callable[[int], object]) -> Callable[[], None]:
    def all_inputs() -> None:
        for index in range(INPUTS):
            run(index)

    return all_inputs


if __name__ == "__main__":
    run_main(main)
