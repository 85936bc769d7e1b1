"""Triton mixers against the reference: on a CUDA device, or in Triton's interpreter where TRITON_INTERPRET=1."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

from makeready.hybrid.mixers.interface import MixerKernels
from makeready.hybrid.mixers.reference.kernels import ReferenceMixers
from mixer_cases import (
    Mixer,
    assert_other_pages_untouched,
    cast,
    clone_pages,
    make_batch,
    make_pages,
    part,
    relative_error,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or (DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"),
    reason="needs a CUDA device, or triton with TRITON_INTERPRET=1 (test_mixers_interpreted.py runs it so)",
)
on_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
LENS = [1, 19, 3, 1, 70, 2, 16, 1] if DEVICE == "cuda" else [1, 9, 3, 1, 37, 2]
"""The interpreter takes milliseconds for an operation."""
ERROR = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
BIG = {
    "mamba2": {"H": 24, "P": 128, "N": 256},
    "mamba2_groups": {"H": 16, "P": 80, "N": 128, "G": 8},
    "mamba1": {"C": 512, "N": 16},
    "gdn": {"H": 8, "Hk": 4, "Dk": 128, "Dv": 128},
    "kda": {"H": 4, "Dk": 128, "Dv": 128},
    "lightning": {"H": 4, "Dk": 128, "Dv": 128},
    "conv": {"C": 3584},
}


@pytest.fixture
def kernels() -> MixerKernels:
    from makeready.hybrid.mixers.triton.mixers import TritonMixers

    return TritonMixers()


def compare(
    kernels, mixer, lens, dtype, state_dtype, *, fresh=(), padding=(), host=True, seed=0, ragged=None, change=None
):
    """One step of both; the reference runs in float32 on the CPU from the very same inputs and states."""
    batch = make_batch(lens, fresh=fresh, host=host, seed=seed, ragged=ragged)
    for index in padding:
        batch.slots[index] = -1
    state = make_pages(batch, mixer.state_shape, dtype=state_dtype)
    wanted_state, pages = clone_pages(state, torch.float32), _to_device(state)
    inputs = cast(mixer.inputs(sum(lens)), dtype)
    if change is not None:
        change(inputs)
    wanted = mixer.run(ReferenceMixers(), cast(inputs, torch.float32), wanted_state, batch)

    on_device = make_batch(
        lens, fresh=fresh, host=host, slots=batch.slots.tolist(), device=DEVICE, ragged=ragged
    )  # fmt: skip
    before = clone_pages(pages)
    out = mixer.run(kernels, {name: value.to(DEVICE) for name, value in inputs.items()}, pages, on_device)
    assert relative_error(out, wanted) < ERROR[dtype]
    used = [slot for slot in batch.slots.tolist() if slot >= 0]
    assert relative_error(pages[used], wanted_state[used]) < max(ERROR[dtype], ERROR[state_dtype])
    assert_other_pages_untouched(before, pages, batch)
    for index in padding:
        start = sum(lens[:index])
        assert not out[start : start + lens[index]].any()


def _to_device(state):
    whole = state._base.to(DEVICE, copy=True)
    return whole.as_strided(state.shape, state.stride(), state.storage_offset())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", Mixer.kinds)
def test_ragged_steps_equal_the_reference(kernels, kind, dtype):
    compare(kernels, Mixer(kind), LENS, dtype, torch.float32, fresh=[0, 1, 5])


@pytest.mark.parametrize("kind", Mixer.kinds)
def test_states_in_the_models_dtype_and_lengths_that_the_host_does_not_know(kernels, kind):
    compare(kernels, Mixer(kind), LENS, torch.bfloat16, torch.bfloat16, fresh=[2], padding=[1, 3], host=False)


@pytest.mark.parametrize("kind", Mixer.kinds)
def test_decodes_and_empty_rows_before_the_longer_requests(kernels, kind):
    """As a captured step with prefill has them; the last row fills the step up."""
    lens = [1, 1, 0, 0, 1, 9, 37, 0, 21]
    compare(kernels, Mixer(kind), lens, torch.float32, torch.float32, fresh=[0, 5], padding=[8], host=False, ragged=5)


@pytest.mark.parametrize("kind", Mixer.kinds)
def test_decode_only_steps_with_padding(kernels, kind):
    compare(kernels, Mixer(kind), [1] * 5, torch.float32, torch.float32, fresh=[1], padding=[2, 4])


@pytest.mark.parametrize("kind", Mixer.kinds)
def test_long_prefill_equals_chunked_prefill_equals_steps(kernels, kind):
    mixer, chunks = Mixer(kind), [1, 33, 2, 39] if DEVICE == "cuda" else [1, 17, 2, 5]
    inputs = {name: value.to(DEVICE) for name, value in mixer.inputs(sum(chunks)).items()}
    runs = []
    for lens in ([sum(chunks)], chunks, [1] * sum(chunks)):
        state = _to_device(make_pages(make_batch([sum(chunks)], fresh=[0], slots=[2]), mixer.state_shape))
        outs, start = [], 0
        for length in lens:
            batch = make_batch([length], slots=[2], fresh=[0] if start == 0 else [], device=DEVICE)
            outs.append(mixer.run(kernels, part(inputs, start, start + length), state, batch))
            start += length
        runs.append((torch.cat(outs), state[2].clone()))
    for out, state in runs[1:]:
        assert relative_error(out, runs[0][0]) < 2e-5
        assert relative_error(state, runs[0][1]) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["gdn", "kda"])
def test_decays_that_would_overflow_if_they_were_undone(kernels, kind, dtype):
    """exp of the decays of 16 tokens is far beyond float32 in some heads and channels, and mild in others."""

    def stronger(inputs):
        inputs["g"][:, 0] *= 40
        if kind == "kda":
            inputs["g"][:, 1, 3:5] *= 40
        inputs["g"][7:9] *= 20

    compare(kernels, Mixer(kind), [67, 1, 20], dtype, torch.float32, fresh=[1], change=stronger)


@pytest.mark.cuda
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BIG)
def test_sizes_of_published_models(kernels, kind, state_dtype):
    lens = [1, 129, 12, 1, 700, 64, 2, 300]
    compare(kernels, Mixer(kind, BIG[kind]), lens, torch.bfloat16, state_dtype, fresh=[0, 4], padding=[5])
    compare(kernels, Mixer(kind, BIG[kind]), [1] * 9, torch.bfloat16, state_dtype, fresh=[3], padding=[8])


@pytest.mark.cuda
@pytest.mark.parametrize("kind", Mixer.kinds)
def test_decodes_run_in_a_cuda_graph_whose_slots_change(kernels, kind):
    mixer = Mixer(kind)
    batch = make_batch([1] * 4, slots=[-1] * 4, pages=9, device=DEVICE)
    inputs = {name: value.to(DEVICE) for name, value in mixer.inputs(4).items()}
    first = make_batch([1] * 4, pages=9, seed=3)
    pages = _to_device(make_pages(first, mixer.state_shape, pages=9))
    eager_pages = clone_pages(pages)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        mixer.run(kernels, inputs, pages, batch)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mixer.run(kernels, inputs, pages, batch)
    for slots in (first.slots.tolist(), [*first.slots.tolist()[:3], -1]):
        batch.slots.copy_(torch.tensor(slots, dtype=torch.int32))
        graph.replay()
        wanted = mixer.run(kernels, inputs, eager_pages, make_batch([1] * 4, slots=slots, pages=9, device=DEVICE))
        assert torch.equal(out, wanted)
        assert torch.equal(pages[first.slots.tolist()], eager_pages[first.slots.tolist()])
