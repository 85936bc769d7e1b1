"""What the mixers benchmark runs: shapes of published models, tokens and states for them, and the work to be done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch

from makeready.hybrid.mixers.batch import StateBatch
from makeready.hybrid.mixers.interface import MixerKernels

Run = Callable[[MixerKernels, torch.Tensor, StateBatch, Mapping[str, torch.Tensor]], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One layer's mixer; unused sizes are 0."""

    model: str
    mixer: str
    """``mamba1``, ``mamba2``, ``gdn``, ``kda`` or ``conv``."""
    heads: int = 0
    """Heads; channels of a convolution or of mamba1."""
    width: int = 0
    """Values of a head; columns of a convolution's state."""
    size: int = 0
    """State size, or keys of a head."""
    groups: int = 0
    """Groups of B and C, or key heads."""

    @property
    def state(self) -> tuple[int, ...]:
        """Shape of one state."""
        if self.mixer == "conv":
            return (self.heads, self.width)
        if self.mixer == "mamba1":
            return (self.heads, self.size)
        if self.mixer == "mamba2":
            return (self.heads, self.width, self.size)
        return (self.heads, self.size, self.width)

    def flops(self, tokens: int) -> int:
        """Products that the recurrence itself needs: one update and one read of the state per token."""
        return 0 if self.mixer == "conv" else 4 * tokens * prod(self.state)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Requests of given lengths, all with states."""

    shape: Shape
    what: str
    lens: tuple[int, ...]
    state_dtype: str = "float32"

    @property
    def name(self) -> str:
        """What the table shows."""
        return f"{self.what} {self.shape.mixer} {self.shape.model} {self.state_dtype}"

    @property
    def decode(self) -> bool:
        """One token each."""
        return max(self.lens) == 1


FALCON = Shape(model="Falcon-H1-7B", mixer="mamba2", heads=24, width=128, size=256, groups=1)
NEMOTRON = Shape(model="Nemotron-3-Nano", mixer="mamba2", heads=64, width=64, size=128, groups=8)
QWEN = Shape(model="Qwen3-Next", mixer="gdn", heads=32, width=128, size=128, groups=16)
KIMI = Shape(model="Kimi-Linear", mixer="kda", heads=32, width=128, size=128, groups=32)
JAMBA = Shape(model="Jamba-v0.1", mixer="mamba1", heads=8192, size=16)
FALCON_CONV = Shape(model="Falcon-H1-7B", mixer="conv", heads=3584, width=4)
RAGGED = (12, 4000, 1, 700, 90, 1, 1300, 64) * 4
PREFILLS = {"64x512": (512,) * 64, "8x4096": (4096,) * 8, "1x8192": (8192,), "1x2048": (2048,), "ragged": RAGGED}


def cases() -> tuple[Case, ...]:
    """Everything, Falcon-H1-7B's mixer first."""
    found = []
    for state_dtype in ("bfloat16", "float32"):
        for requests in (1, 8, 64, 256):
            lens = (1,) * requests
            found.append(Case(shape=FALCON, what=f"decode {requests}", lens=lens, state_dtype=state_dtype))
    found += [Case(shape=FALCON, what=f"prefill {name}", lens=lens) for name, lens in PREFILLS.items()]
    for shape in (FALCON_CONV, NEMOTRON, QWEN, KIMI, JAMBA):
        dtype = "bfloat16" if shape.mixer == "conv" else "float32"
        found += [
            Case(shape=shape, what=f"decode {requests}", lens=(1,) * requests, state_dtype=dtype)
            for requests in (64, 256)
        ]
        found += [
            Case(shape=shape, what=f"prefill {name}", lens=PREFILLS[name], state_dtype=dtype)
            for name in ("64x512", "8x4096")
        ]
    return tuple(found)


def small_cases() -> tuple[Case, ...]:
    """One small case per mixer, for any machine."""
    shapes = (
        replace(FALCON, heads=2, width=16, size=16),
        replace(QWEN, heads=2, groups=1, width=16, size=16),
        replace(KIMI, heads=2, groups=2, width=16, size=16),
        replace(JAMBA, heads=32),
        replace(FALCON_CONV, heads=32),
    )
    steps = (("decode", (1, 1)), ("prefill", (9, 20)))
    return tuple(Case(shape=shape, what=what, lens=lens) for shape in shapes for what, lens in steps)


def batch_of(case: Case, device: str) -> StateBatch:
    """Requests on random distinct pages."""
    starts = torch.tensor([0, *case.lens]).cumsum(0).to(torch.int32)
    requests = len(case.lens)
    return StateBatch(
        query_start=starts.to(device),
        slots=torch.randperm(requests + 1)[:requests].to(dtype=torch.int32, device=device),
        fresh=torch.zeros(requests, dtype=torch.bool, device=device),
        max_query_len=max(case.lens),
        query_lens_host=case.lens,
        decode_only=case.decode,
    )


def tokens_of(shape: Shape, tokens: int, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """Token tensors of a layer; x, B and C are slices of one projection, as models give them."""

    def randn(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*size, dtype=torch.float32, device=device).to(dtype)

    heads, width, size, groups = shape.heads, shape.width, shape.size, shape.groups
    if shape.mixer == "conv":
        return {"x": randn(tokens, heads + 64)[:, :heads]}
    if shape.mixer == "mamba1":
        sides = randn(tokens, 2 * size)
        return {"x": randn(tokens, heads), "dt": randn(tokens, heads), "B": sides[:, :size], "C": sides[:, size:]}
    if shape.mixer == "mamba2":
        wide = randn(tokens, heads * width + 2 * groups * size)
        inner, last = heads * width, heads * width + groups * size
        return {
            "x": wide[:, :inner].view(tokens, heads, width),
            "dt": randn(tokens, heads),
            "B": wide[:, inner:last].view(tokens, groups, size),
            "C": wide[:, last:].view(tokens, groups, size),
        }
    decays = (tokens, heads, size) if shape.mixer == "kda" else (tokens, heads)
    return {
        "q": randn(tokens, groups, size),
        "k": randn(tokens, groups, size),
        "v": randn(tokens, heads, width),
        "g": -torch.rand(decays, device=device),
        "beta": torch.rand(tokens, heads, device=device),
    }


def runner(shape: Shape, device: str) -> Run:
    """The layer with random weights."""
    heads, mixer = shape.heads, shape.mixer
    if mixer == "conv":
        weight, bias = torch.randn(heads, 4, device=device), torch.randn(heads, device=device)

        def convolve(
            kernels: MixerKernels, state: torch.Tensor, batch: StateBatch, given: Mapping[str, torch.Tensor]
        ) -> torch.Tensor:
            x = given["x"]
            return kernels.causal_conv(x, weight.to(x.dtype), bias.to(x.dtype), state, batch, activation="silu")

        return convolve
    if mixer in ("gdn", "kda"):

        def delta(
            kernels: MixerKernels, state: torch.Tensor, batch: StateBatch, given: Mapping[str, torch.Tensor]
        ) -> torch.Tensor:
            call = kernels.gated_delta if mixer == "gdn" else kernels.kda
            return call(given["q"], given["k"], given["v"], given["g"], given["beta"], state, batch)

        return delta
    shape_a = (heads, shape.size) if mixer == "mamba1" else (heads,)
    a, skip = -torch.rand(shape_a, device=device) - 0.1, torch.randn(heads, device=device)
    bias = torch.randn(heads, device=device) - 3

    def scan(
        kernels: MixerKernels, state: torch.Tensor, batch: StateBatch, given: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        call = kernels.mamba1 if mixer == "mamba1" else kernels.mamba2
        x, dt, keys, queries = (given[name] for name in ("x", "dt", "B", "C"))
        return call(x, dt, a, keys, queries, state, batch, D=skip, dt_bias=bias, dt_softplus=True)

    return scan
