"""Time of the Triton mixers on one GPU: decodes against copy bandwidth, prefills against the tensor cores.

python benchmarks/mixers.py --out mixers.json [--only decode_mamba2 ...] [--sweep]
Every time is the median of CUDA-graph replays; every case is compared with the float32 reference on a few requests.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton

from makeready.hybrid.mixers.batch import StateBatch
from makeready.hybrid.mixers.reference.kernels import ReferenceMixers
from makeready.hybrid.mixers.triton import mamba2 as mamba2_launch
from makeready.hybrid.mixers.triton.mixers import TritonMixers
from makeready.hybrid.mixers.triton.tiles import Tile

FALCON = {"H": 24, "P": 128, "N": 256, "G": 1}
"""Falcon-H1-7B; 44 layers."""
NEMOTRON = {"H": 64, "P": 64, "N": 128, "G": 8}
"""Nemotron-3-Nano."""
DEVICE = "cuda"


def batch_of(lens: list[int], pages: int, *, fresh: bool) -> StateBatch:
    """Requests of these lengths on random distinct pages."""
    starts = torch.tensor([0, *lens]).cumsum(0).to(torch.int32)
    return StateBatch(
        query_start=starts.to(DEVICE),
        slots=torch.randperm(pages)[: len(lens)].to(torch.int32).to(DEVICE),
        fresh=torch.full((len(lens),), fresh, device=DEVICE),
        max_query_len=max(lens),
        query_lens_host=tuple(lens),
        decode_only=max(lens) == 1,
    )


def graph_time(run: Callable[[], Any], *, seconds: float = 0.4) -> float:
    """Median microseconds of one call, from replays of a graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    torch.cuda.synchronize()
    return 1000 * triton.testing.do_bench(graph.replay, warmup=50, rep=int(seconds * 1000), return_mode="median")


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def mamba2_inputs(tokens: int, s: dict[str, int]) -> tuple[torch.Tensor, ...]:
    """x, dt, B, C in bf16, x and B and C as slices of the convolution's output."""
    wide = torch.randn(tokens, s["H"] * s["P"] + 2 * s["G"] * s["N"], device=DEVICE, dtype=torch.bfloat16)
    x, b, c = wide.split([s["H"] * s["P"], s["G"] * s["N"], s["G"] * s["N"]], dim=-1)
    dt = torch.randn(tokens, s["H"], device=DEVICE, dtype=torch.bfloat16)
    groups = (s["G"], s["N"])
    return x.unflatten(-1, (s["H"], s["P"])), dt, b.unflatten(-1, groups), c.unflatten(-1, groups)


def mamba2_case(lens: list[int], s: dict[str, int], state_dtype: torch.dtype, tiles: Any, *, check: bool) -> dict:
    pages = len(lens) + 1
    state = torch.randn(pages, s["H"], s["P"], s["N"], device=DEVICE, dtype=torch.float32).to(state_dtype)
    batch = batch_of(lens, pages, fresh=False)
    x, dt, b, c = mamba2_inputs(sum(lens), s)
    a = -torch.rand(s["H"], device=DEVICE) - 0.1
    d, bias = torch.randn(s["H"], device=DEVICE), torch.randn(s["H"], device=DEVICE) - 3
    fixed = {"D": d, "dt_bias": bias, "dt_softplus": True, "z": None}

    def run() -> torch.Tensor:
        return mamba2_launch.mamba2(x, dt, a, b, c, state, batch, limits=(0.0, float("inf")) * 2, tiles=tiles, **fixed)

    result: dict[str, Any] = {}
    if check:
        few = min(len(lens), 2)
        tokens = sum(lens[:few])
        small = StateBatch(
            query_start=batch.query_start[: few + 1], slots=batch.slots[:few], fresh=batch.fresh[:few],
            max_query_len=batch.max_query_len, query_lens_host=tuple(lens[:few]), decode_only=batch.decode_only,
        )  # fmt: skip
        reference = state.float()
        wanted = ReferenceMixers().mamba2(
            *(side[:tokens].float() for side in (x, dt)), a, *(side[:tokens].float() for side in (b, c)),
            reference, small, chunk_size=64, **fixed,
        )  # fmt: skip
        out = run()
        used = small.slots.tolist()
        result |= {"error": error(out[:tokens], wanted), "state_error": error(state[used], reference[used])}
        state.copy_(torch.randn(state.shape, device=DEVICE, dtype=torch.float32))
    result["us"] = graph_time(run)
    if max(lens) == 1:
        moved = 2 * len(lens) * s["H"] * s["P"] * s["N"] * state.element_size()
        result["TB_per_s"] = moved / result["us"] / 1e6
    else:
        tokens = sum(lens)
        result["TFLOP_per_s_useful"] = tokens * s["H"] * s["P"] * s["N"] * 4 / result["us"] / 1e6
    return result


def conv_case(lens: list[int], channels: int, columns: int) -> dict:
    pages = len(lens) + 1
    state = torch.randn(pages, channels, columns, device=DEVICE, dtype=torch.bfloat16)
    batch = batch_of(lens, pages, fresh=False)
    x = torch.randn(sum(lens), channels + 512, device=DEVICE, dtype=torch.bfloat16)[:, :channels]
    weight = torch.randn(channels, 4, device=DEVICE, dtype=torch.bfloat16)
    bias = torch.randn(channels, device=DEVICE, dtype=torch.bfloat16)
    before = state.clone()
    out = TritonMixers().causal_conv(x, weight, bias, state, batch, activation="silu")
    wanted = ReferenceMixers().causal_conv(
        x.float(), weight.float(), bias.float(), before.float(), batch, activation="silu"
    )
    us = graph_time(lambda: TritonMixers().causal_conv(x, weight, bias, state, batch, activation="silu"))
    moved = 2 * 2 * channels * (sum(lens) + len(lens) * columns)
    return {"error": error(out, wanted), "us": us, "TB_per_s": moved / us / 1e6}


def copy_bandwidth() -> float:
    source = torch.randn(512 * 2**20 // 4, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / graph_time(lambda: target.copy_(source)) / 1e6


def cases(sweep: bool) -> dict[str, Callable[[], dict]]:
    """Every case by name."""
    found: dict[str, Callable[[], dict]] = {}
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}

    def add(name: str, *arguments: Any, **more: Any) -> None:
        found[name] = lambda: mamba2_case(*arguments, **more)

    for (state, dtype), requests in product(dtypes.items(), (1, 8, 64, 256)):
        name = f"decode_mamba2 falcon {state} {requests}"
        add(name, [1] * requests, FALCON, dtype, None, check=True)
        if sweep and requests in (64, 256):
            for rows, warps in product((8, 16, 32, 64), (2, 4, 8)):
                tiles = (Tile(rows=rows, warps=warps), Tile(rows=64))
                add(f"{name} rows {rows} warps {warps}", [1] * requests, FALCON, dtype, tiles, check=False)
    add("decode_mamba2 nemotron float32 256", [1] * 256, NEMOTRON, torch.float32, None, check=True)
    shapes = {"64x512": [512] * 64, "8x4096": [4096] * 8, "1x8192": [8192], "1x2048": [2048]}
    shapes["ragged"] = [12, 4000, 1, 700, 90, 1, 1300, 64] * 4
    for name, lens in shapes.items():
        add(f"prefill_mamba2 falcon {name}", lens, FALCON, torch.float32, None, check=True)
        if sweep and name in ("64x512", "8x4096", "1x2048"):
            options = product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3))
            for rows, tokens, warps, stages in options:
                if rows * tokens > 64 * 128 or (tokens == 128 and stages > 1):
                    continue
                tiles = (Tile(rows=32), Tile(rows=rows, tokens=tokens, warps=warps, stages=stages))
                label = f"prefill_mamba2 falcon {name} rows {rows} tokens {tokens} warps {warps} stages {stages}"
                add(label, lens, FALCON, torch.float32, tiles, check=name == "1x2048")
    add("prefill_mamba2 nemotron 64x512", [512] * 64, NEMOTRON, torch.float32, None, check=True)
    for requests in (1, 64, 256):
        found[f"decode_conv 3584 {requests}"] = lambda requests=requests: conv_case([1] * requests, 3584, 4)
    found["prefill_conv 3584 64x512"] = lambda: conv_case([512] * 64, 3584, 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[""], help="cases whose names start so")
    parser.add_argument("--contains", nargs="*", default=[""], help="and contain one of these")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--seconds", type=float, default=90.0, help="start no case after this time")
    options = parser.parse_args()
    torch.manual_seed(0)
    began = time.monotonic()
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "copy_TB_per_s": copy_bandwidth(), "cases": {},
    }  # fmt: skip
    print("copy", report["copy_TB_per_s"], flush=True)
    for name, run in cases(options.sweep).items():
        if not name.startswith(tuple(options.only)) or not any(part in name for part in options.contains):
            continue
        if time.monotonic() - began > options.seconds:
            report["stopped_before"] = name
            break
        try:
            result = run()
        except Exception as failure:  # one variant that does not compile must not lose the others
            result = {"failed": f"{type(failure).__name__}: {failure}"[:300]}
        report["cases"][name] = result
        print(name, json.dumps(result), flush=True)
        options.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
