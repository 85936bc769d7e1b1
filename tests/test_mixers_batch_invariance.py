"""What a request gets does not depend on the other requests of its step, bit for bit."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

from makeready.hybrid.mixers.interface import MixerKernels
from makeready.hybrid.mixers.reference.kernels import ReferenceMixers
from mixer_cases import Mixer, cast, make_batch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HAS_TRITON = find_spec("triton") is not None and (DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")
LENS = [1, 129, 12, 1, 700, 64, 2, 300, 1, 17] if DEVICE == "cuda" else [1, 9, 1, 37, 2]
DTYPES = [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.bfloat16]
"""The interpreter takes milliseconds for an operation."""
BIG = {
    "mamba2": {"H": 24, "P": 128, "N": 256},
    "mamba2_groups": {"H": 16, "P": 80, "N": 128, "G": 8},
    "mamba1": {"C": 512, "N": 16},
    "gdn": {"H": 8, "Hk": 4, "Dk": 128, "Dv": 128},
    "kda": {"H": 4, "Dk": 128, "Dv": 128},
    "lightning": {"H": 4, "Dk": 128, "Dv": 128},
    "conv": {"C": 3584},
    "conv_wide": {"C": 3584},
}


@pytest.fixture(params=["triton", "plain"])
def kernels(request) -> MixerKernels:
    if request.param == "plain":
        return ReferenceMixers(alone=True)
    if not HAS_TRITON:
        pytest.skip("needs a CUDA device, or triton with TRITON_INTERPRET=1 (test_mixers_interpreted.py runs it so)")
    from makeready.hybrid.mixers.triton.mixers import TritonMixers

    return TritonMixers()


class Requests:
    """Tokens and states of some requests, and what they get in any company."""

    def __init__(self, mixer: Mixer, lens, dtype, state_dtype, fresh=()) -> None:
        self.mixer, self.lens, self.fresh = mixer, lens, set(fresh)
        self.tokens = [cast(mixer.inputs(length), dtype, DEVICE) for length in lens]
        self.states = [mixer.randn(*mixer.state_shape).to(DEVICE, state_dtype) for _ in lens]

    def run(self, kernels, chosen, *, seed=0, padding=0, host=True):
        """(outputs, new state) of each chosen request, in one step in this order, on random pages."""
        pages = len(chosen) + 5
        slots = torch.randperm(pages, generator=torch.Generator().manual_seed(seed))[: len(chosen)].tolist()
        lens = [*(self.lens[index] for index in chosen), *[1] * padding]
        fresh = [place for place, index in enumerate(chosen) if index in self.fresh]
        batch = make_batch(lens, fresh=fresh, slots=slots + [-1] * padding, device=DEVICE, host=host)
        state = torch.full((pages, *self.mixer.state_shape), torch.nan, device=DEVICE, dtype=self.states[0].dtype)
        for index, slot in zip(chosen, slots, strict=True):
            if index not in self.fresh:
                state[slot] = self.states[index]
        parts = [self.tokens[index] for index in (*chosen, *[chosen[0]] * padding)]
        step = {
            name: torch.cat([part[name][:length] for part, length in zip(parts, lens, strict=True)])
            for name in parts[0]
        }
        out = self.mixer.run(kernels, step, state, batch)
        starts = torch.tensor([0, *lens]).cumsum(0).tolist()
        return [
            (out[starts[place] : starts[place + 1]].clone(), state[slot].clone()) for place, slot in enumerate(slots)
        ]


def check(requests, kernels, companies):
    alone = {index: requests.run(kernels, [index], seed=index)[0] for index in range(len(requests.lens))}
    for seed, (company, padding, host) in enumerate(companies):
        for index, (out, state) in zip(
            company, requests.run(kernels, company, seed=seed, padding=padding, host=host), strict=True
        ):
            where = f"request {index} of {requests.lens[index]} tokens in company {company}"
            assert torch.equal(out, alone[index][0]), f"outputs differ: {where}"
            assert torch.equal(state, alone[index][1]), f"states differ: {where}"


@pytest.mark.parametrize("state_dtype", DTYPES)
@pytest.mark.parametrize("kind", Mixer.kinds)
def test_ragged_prefills_and_decodes(kernels, kind, state_dtype):
    """Short and long, fresh and continued, in different orders, beside padding, and alone."""
    sizes = BIG.get(kind) if DEVICE == "cuda" and kernels.name == "triton" else None
    dtype = torch.bfloat16 if state_dtype == torch.bfloat16 or DEVICE == "cuda" else torch.float32
    requests = Requests(Mixer(kind, sizes), LENS, dtype, state_dtype, fresh=[0, 3])
    everybody = list(range(len(LENS)))
    check(requests, kernels, [(everybody, 0, True), (everybody[::-1], 2, True), (everybody[1:4], 0, False)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", Mixer.kinds)
def test_steps_of_decodes(kernels, kind, dtype):
    """A captured step's kernels, and those of a step with longer requests in it, give a decode the same bits."""
    sizes = BIG.get(kind) if DEVICE == "cuda" and kernels.name == "triton" else None
    decodes = 33 if DEVICE == "cuda" else 4
    requests = Requests(Mixer(kind, sizes), [*[1] * decodes, 5], dtype, torch.float32, fresh=[1])
    everybody = list(range(decodes))
    check(requests, kernels, [(everybody, 0, True), (everybody[:3], 3, True), ([*everybody, decodes], 0, True)])


@pytest.mark.skipif(not HAS_TRITON, reason="needs a CUDA device, or triton with TRITON_INTERPRET=1")
@pytest.mark.parametrize("kind", Mixer.kinds)
def test_prefill_cut_where_kernels_cut(kind):
    """With float32 states, a prefill in parts that are whole chunks of the kernels has the bits of one call.

    mamba1 and convolutions go token by token: they may be cut anywhere.
    """
    from makeready.hybrid.mixers.triton.mixers import TritonMixers

    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    whole = {"gdn": 64, "kda": 64} if DEVICE == "cuda" else {"gdn": 16, "kda": 16}
    anywhere = {"mamba1": 7, "mamba1_heads": 7, "conv": 5, "conv_wide": 5}
    chunk = (whole | anywhere).get(kind, 128 if DEVICE == "cuda" else 32)
    mixer = Mixer(kind, BIG.get(kind) if DEVICE == "cuda" else None)
    tokens = 4 * chunk + 3
    inputs = cast(mixer.inputs(tokens), dtype, DEVICE)
    results = []
    cuttings = [[tokens], [chunk, 2 * chunk, chunk + 3], [3 * chunk, chunk + 3]]
    if kind in anywhere:
        cuttings.append([1, 1, 2, tokens - 5, 1])
    for cuts in cuttings:
        state = torch.full((3, *mixer.state_shape), torch.nan, device=DEVICE)
        outs, start = [], 0
        for length in cuts:
            batch = make_batch([length], fresh=[0] if start == 0 else [], slots=[1], device=DEVICE)
            part = {name: value[start : start + length] for name, value in inputs.items()}
            outs.append(mixer.run(TritonMixers(), part, state, batch))
            start += length
        results.append((torch.cat(outs), state[1].clone()))
    for out, state in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(state, results[0][1])
