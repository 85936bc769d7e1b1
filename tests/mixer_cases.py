"""Ragged steps of state mixers: random slots, every other page and the memory between pages full of NaN."""

from __future__ import annotations

import torch

from makeready.hybrid.mixers.batch import StateBatch
from makeready.hybrid.mixers.interface import MixerKernels
from makeready.hybrid.mixers.reference.kernels import ReferenceMixers


def make_batch(lens, *, fresh=None, slots=None, pages=None, seed=0, device="cpu", host=True, ragged=None) -> StateBatch:
    """B requests on random distinct pages; ``fresh`` lists the requests without a state (default: none)."""
    pages = pages or len(lens) + 3
    rng = torch.Generator().manual_seed(seed)
    if slots is None:
        slots = torch.randperm(pages, generator=rng)[: len(lens)].tolist()
    starts = torch.tensor([0, *lens]).cumsum(0).to(torch.int32)
    fresh_flags = torch.zeros(len(lens), dtype=torch.bool)
    fresh_flags[list(fresh or [])] = True
    return StateBatch(
        query_start=starts.to(device),
        slots=torch.tensor(slots, dtype=torch.int32).to(device),
        fresh=fresh_flags.to(device),
        max_query_len=max(lens),
        query_lens_host=tuple(lens) if host else None,
        decode_only=all(length == 1 for length in lens),
        num_ragged=ragged,
    )


def make_pages(
    batch: StateBatch, shape, *, dtype=torch.float32, device="cpu", pages=None, seed=1, gap=5
) -> torch.Tensor:
    """(num_slots, *shape) strided pages in poisoned memory; only pages of requests that continue hold values."""
    pages = pages or int(batch.slots.max()) + 3
    size = int(torch.tensor(shape).prod())
    memory = torch.full((pages, size + gap), float("nan"), dtype=dtype, device=device)
    state = memory[:, :size].unflatten(1, tuple(shape))
    rng = torch.Generator().manual_seed(seed)
    for slot, fresh in zip(batch.slots.tolist(), batch.fresh.tolist(), strict=True):
        values = torch.randn(shape, generator=rng)
        if slot >= 0 and not fresh:
            state[slot] = values.to(dtype).to(device)
    return state


def clone_pages(state: torch.Tensor, dtype=None) -> torch.Tensor:
    """A copy with the same strides, gaps included."""
    whole = state._base if state._base is not None else state
    copy = whole.clone() if dtype is None else whole.to(dtype, copy=True)
    return copy.as_strided(state.shape, state.stride(), state.storage_offset())


def assert_other_pages_untouched(before: torch.Tensor, after: torch.Tensor, batch: StateBatch) -> None:
    """Pages of nobody in the batch, and the gaps between pages, hold the very same bytes."""
    used = {slot for slot in batch.slots.tolist() if slot >= 0}
    others = [page for page in range(before.shape[0]) if page not in used]
    whole_before, whole_after = before._base, after._base
    size = before[0].numel()
    assert torch.equal(_bytes(whole_before[others]), _bytes(whole_after[others]))
    assert torch.equal(_bytes(whole_before[:, size:]), _bytes(whole_after[:, size:]))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """||found - wanted|| / ||wanted||; NaN where anything is not finite."""
    found, wanted = found.double().cpu(), wanted.double().cpu()
    assert found.shape == wanted.shape
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))


class Mixer:
    """One mixer with random inputs: ``run(kernels, inputs, state, batch)`` and the shape of its state."""

    kinds = ("conv", "conv_wide", "mamba2", "mamba2_groups", "mamba1", "mamba1_heads", "gdn", "kda", "lightning")

    def __init__(self, kind: str, sizes: dict[str, int] | None = None, *, seed=7) -> None:
        self.kind = kind
        defaults = {"H": 4, "P": 16, "N": 16, "G": 1, "C": 40, "K": 4, "Hk": 2, "Dk": 16, "Dv": 16}
        if kind == "mamba2_groups":
            defaults |= {"G": 2, "P": 24, "N": 32}
        if kind == "gdn":
            defaults |= {"Dk": 24, "Dv": 40}
        self.s = {**defaults, **(sizes or {})}
        self.rng = torch.Generator().manual_seed(seed)
        s = self.s
        self.moved = {}
        self.fixed = {
            "weight": self.randn(s["C"], s["K"]) / 2,
            "bias": self.randn(s["C"]) / 2,
            "A": -torch.exp(self.randn(s["H"]) / 2),
            "D": self.randn(s["H"]),
            "dt_bias": self.randn(s["H"]) / 2,
            "A1": -torch.exp(self.randn(s["C"], s["N"]) / 2),
            "D1": self.randn(s["C"]),
            "dt_bias1": self.randn(s["C"]) / 2,
            "slopes": torch.rand(s["H"], generator=self.rng),
        }

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.rng)

    @property
    def state_shape(self):
        s = self.s
        return {
            "conv": (s["C"], s["K"]),
            "conv_wide": (s["C"], s["K"] - 1),
            "mamba2": (s["H"], s["P"], s["N"]),
            "mamba1": (s["C"], s["N"]),
            "gdn": (s["H"], s["Dk"], s["Dv"]),
            "kda": (s["H"], s["Dk"], s["Dv"]),
            "lightning": (s["H"], s["Dk"], s["Dv"]),
            "mamba2_groups": (s["H"], s["P"], s["N"]),
            "mamba1_heads": (2, s["C"] // 2, s["N"]),
        }[self.kind]

    def inputs(self, tokens: int) -> dict[str, torch.Tensor]:
        """Token tensors; slices of a wider projection where models give slices."""
        s = self.s
        if self.kind.startswith("conv"):
            return {"x": self.randn(tokens, s["C"] + 3)[:, 2:-1]}
        if self.kind.startswith("mamba2"):
            wide = self.randn(tokens, s["H"] * s["P"] + 2 * s["G"] * s["N"] + 5)
            x, b, c = wide[:, :-5].split([s["H"] * s["P"], s["G"] * s["N"], s["G"] * s["N"]], dim=-1)
            return {
                "x": x.unflatten(-1, (s["H"], s["P"])),
                "B": b.unflatten(-1, (s["G"], s["N"])),
                "C": c.unflatten(-1, (s["G"], s["N"])),
                "dt": self.randn(tokens, s["H"]),
                "z": self.randn(tokens, s["H"], s["P"]),
            }
        if self.kind.startswith("mamba1"):
            groups = (2,) if self.kind == "mamba1_heads" else ()
            return {
                "x": self.randn(tokens, s["C"]),
                "dt": self.randn(tokens, s["C"]),
                "B": self.randn(tokens, *groups, s["N"]),
                "C": self.randn(tokens, *groups, s["N"]),
                "z": self.randn(tokens, s["C"]),
            }
        heads = s["Hk"] if self.kind == "gdn" else s["H"]
        given = {
            "q": self.randn(tokens, heads, s["Dk"]),
            "k": self.randn(tokens, heads, s["Dk"]),
            "v": self.randn(tokens, s["H"], s["Dv"]),
        }
        if self.kind == "lightning":
            return {**given, "k": given["k"] / 4}
        shape = (tokens, s["H"], s["Dk"]) if self.kind == "kda" else (tokens, s["H"])
        given["g"] = -torch.nn.functional.softplus(self.randn(*shape) * 2)
        given["beta"] = torch.sigmoid(self.randn(tokens, s["H"]))
        return given

    def run(self, kernels: MixerKernels, inputs, state, batch) -> torch.Tensor:
        """The mixer's output for these tokens; the state's pages are updated."""
        if state.device not in self.moved:  # once, so that a graph can be captured later
            self.moved[state.device] = {name: value.to(state.device) for name, value in self.fixed.items()}
        f = self.moved[state.device]
        if self.kind.startswith("conv"):
            x = inputs["x"]
            return kernels.causal_conv(
                x, f["weight"].to(x.dtype), f["bias"].to(x.dtype), state, batch, activation="silu"
            )
        if self.kind.startswith("mamba2"):
            return kernels.mamba2(
                *(inputs[name] for name in ("x", "dt")), f["A"], inputs["B"], inputs["C"], state, batch,
                D=f["D"], dt_bias=f["dt_bias"], dt_softplus=True, dt_limit=(0.05, 3.0), decode_dt_limit=None,
                z=inputs["z"], chunk_size=8,
            )  # fmt: skip
        if self.kind.startswith("mamba1"):
            return kernels.mamba1(
                inputs["x"], inputs["dt"], f["A1"], inputs["B"], inputs["C"], state, batch,
                D=f["D1"], dt_bias=f["dt_bias1"], dt_softplus=True, z=inputs["z"],
            )  # fmt: skip
        q, k, v = (inputs[name] for name in ("q", "k", "v"))
        if self.kind == "lightning":
            return kernels.lightning(q, k, v, f["slopes"], state, batch, scale=0.5)
        call = kernels.gated_delta if self.kind == "gdn" else kernels.kda
        return call(q, k, v, inputs["g"], inputs["beta"], state, batch)


def part(inputs, start, end):
    """The tokens ``start`` to ``end`` of all inputs."""
    return {name: value[start:end] for name, value in inputs.items()}


def cast(inputs, dtype, device="cpu"):
    """Inputs in a model's dtype; decays and time steps stay float32 as models compute them."""
    kept = ("g", "beta", "dt")
    return {
        name: value.to(device=device, dtype=torch.float32 if name in kept else dtype) for name, value in inputs.items()
    }


def token_by_token(mixer: Mixer, inputs, state, slot: int, fresh: bool) -> torch.Tensor:
    """The reference's one-step update over the tokens of one request."""
    outs = []
    tokens = next(iter(inputs.values())).shape[0]
    for position in range(tokens):
        batch = make_batch([1], slots=[slot], fresh=[0] if fresh and position == 0 else [])
        outs.append(mixer.run(ReferenceMixers(), part(inputs, position, position + 1), state, batch))
    return torch.cat(outs)
