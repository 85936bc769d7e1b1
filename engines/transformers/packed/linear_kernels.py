"""Few tokens through several weight matrices in one launch: the time is that of reading the weights once.

A program owns rows of one matrix, picked by its number; small matrices thereby share a launch with large ones, where
each alone would leave most of the device idle. Imports Triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ....early_launch import early_launch

MAX_WEIGHTS = 4


@triton.jit
def _tile(w0, w1, w2, w3, y0, y1, y2, y3, n0, n1, n2, n3, ROWS: tl.constexpr):
    """The matrix of this program, its output, its number of rows, and which rows are the program's."""
    program = tl.program_id(0)
    first1 = tl.cdiv(n0, ROWS)
    first2 = first1 + tl.cdiv(n1, ROWS)
    first3 = first2 + tl.cdiv(n2, ROWS)
    w, y, n, tile = w0, y0, n0, program
    if program >= first3:
        w, y, n, tile = w3, y3, n3, program - first3
    elif program >= first2:
        w, y, n, tile = w2, y2, n2, program - first2
    elif program >= first1:
        w, y, n, tile = w1, y1, n1, program - first1
    return w, y, n, tile * ROWS + tl.arange(0, ROWS)


@triton.jit
def one_token_kernel(
    x, residual, w0, w1, w2, w3, y0, y1, y2, y3, n0, n1, n2, n3, M, K, x_m,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ADDED: tl.constexpr, EARLY: tl.constexpr,
    UNROLLED: tl.constexpr,
):  # fmt: skip
    """y = W x for one token, plus ``residual`` if ADDED.

    Products are summed per column in float32: the full width of the loads, and no tensor cores.
    """
    w, y, n, rows = _tile(w0, w1, w2, w3, y0, y1, y2, y3, n0, n1, n2, n3, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows < n)[:, None]
    at = w + rows.to(tl.int64)[:, None] * K + columns[None, :]
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for start in tl.range(0, K, COLUMNS, loop_unroll_factor=UNROLLED):
        weights = tl.load(at + start, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        sums += weights * tl.load(x + start + columns).to(tl.float32)[None, :]
    total = tl.sum(sums, 1).to(y.dtype.element_ty)
    if ADDED:
        total = (total.to(tl.float32) + tl.load(residual + rows, mask=rows < n).to(tl.float32)).to(y.dtype.element_ty)
    tl.store(y + rows, total, mask=rows < n)


@triton.jit
def few_tokens_kernel(
    x, residual, w0, w1, w2, w3, y0, y1, y2, y3, n0, n1, n2, n3, M, K, x_m,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ADDED: tl.constexpr, EARLY: tl.constexpr,
    UNROLLED: tl.constexpr,
):  # fmt: skip
    """y = W x for up to TOKENS tokens, rows of W as the left side of tensor core products."""
    w, y, n, rows = _tile(w0, w1, w2, w3, y0, y1, y2, y3, n0, n1, n2, n3, ROWS)
    tokens, columns = tl.arange(0, TOKENS), tl.arange(0, COLUMNS)
    inside, there = (rows < n)[:, None], (tokens < M)[None, :]
    at_w = w + rows.to(tl.int64)[:, None] * K + columns[None, :]
    at_x = x + tokens[None, :] * x_m + columns[:, None]
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    sums = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    for start in range(0, K, COLUMNS):
        weights = tl.load(at_w + start, mask=inside, other=0.0, eviction_policy="evict_first")
        sums = tl.dot(weights, tl.load(at_x + start, mask=there, other=0.0), sums)
    tl.store(y + tokens[None, :] * n + rows[:, None], sums.to(y.dtype.element_ty), mask=inside & there)


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a launch is cut."""

    tokens: int
    rows: int
    columns: int
    warps: int
    stages: int
    unrolled: int = 1


def tiles_for(tokens: int, rows: int, columns: int) -> Tiles | None:
    """What was fastest on one H200 for ``tokens`` through matrices of ``rows`` rows in all; None: another way is.

    Measured at 1, 8, 32 and 64 tokens, 2,048 to 24,576 rows, 1,536 to 12,288 columns (benchmarks/LOG.md, launch).
    """
    if tokens == 1:
        if rows >= 6000:
            tiles = Tiles(1, 8, 512, 4, 3, unrolled=2)
        else:
            tiles = Tiles(1, 8, 1024, 8, 3) if columns % 1024 == 0 else Tiles(1, 8, 512, 4, 3)
    elif tokens <= 32:
        tiles = Tiles(16 if tokens <= 16 else 32, 64, 128, 4, 4)
    elif tokens <= 64:
        tiles = Tiles(64, 64, 128, 4, 6)
    else:
        return None
    return tiles if columns % tiles.columns == 0 else None


def launch(
    x: torch.Tensor, weights: list[torch.Tensor], tiles: Tiles, residual: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """(T, K) through matrices (N, K), all contiguous along K, to (T, N) each; one token adds ``residual`` (1, N)."""
    outputs = [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]
    missing = MAX_WEIGHTS - len(weights)
    sizes = [*(weight.shape[0] for weight in weights), *[0] * missing]
    grid = (sum(-(-size // tiles.rows) for size in sizes),)
    kernel = one_token_kernel if tiles.tokens == 1 else few_tokens_kernel
    kernel[grid](
        x, x if residual is None else residual, *weights, *[weights[0]] * missing, *outputs, *[outputs[0]] * missing,
        *sizes, x.shape[0], x.shape[1], x.stride(0), TOKENS=tiles.tokens, ROWS=tiles.rows, COLUMNS=tiles.columns,
        ADDED=residual is not None, UNROLLED=tiles.unrolled, num_warps=tiles.warps, num_stages=tiles.stages,
        **early_launch(x.device),
    )  # fmt: skip
    return outputs
