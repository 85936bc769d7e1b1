"""Faults that other engines published, replayed on the mixers: stale or unwritten state used as if it were valid."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from makeready.hybrid.mixers.interface import MixerKernels
from makeready.hybrid.mixers.reference.kernels import ReferenceMixers
from mixer_cases import Mixer, cast, clone_pages, make_batch, make_pages, part, relative_error

CUDA = torch.cuda.is_available()
COMPILED = find_spec("triton") is not None and (CUDA or os.environ.get("TRITON_INTERPRET") == "1")
KINDS = ("conv", "mamba2", "mamba1", "gdn", "kda")


@pytest.fixture(params=["reference", "triton"])
def kernels(request) -> MixerKernels:
    if request.param == "reference":
        return ReferenceMixers()
    if not COMPILED:
        pytest.skip("needs a CUDA device, or triton with TRITON_INTERPRET=1")
    from makeready.hybrid.mixers.triton.mixers import TritonMixers

    return TritonMixers()


@pytest.fixture
def device(kernels) -> str:
    return "cuda" if CUDA and kernels.name == "triton" else "cpu"


def on(device, tensors):
    return {name: value.to(device) for name, value in tensors.items()}


def pages_on(device, pages):
    whole = pages._base.to(device, copy=True)
    return whole.as_strided(pages.shape, pages.stride(), pages.storage_offset())


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_request_never_reads_the_state_of_the_one_that_finished(kernels, device, kind):
    """vllm#56524, ik_llama.cpp#1932: blocks of a finished request are handed on with its state in them."""
    mixer = Mixer(kind)
    inputs = on(device, mixer.inputs(9))
    used = make_batch([9], slots=[1], fresh=[0], device=device)
    pages = pages_on(device, make_pages(make_batch([9], slots=[1]), mixer.state_shape))
    first = mixer.run(kernels, inputs, pages, used)
    again = mixer.run(kernels, inputs, pages, used)  # the same page, with the finished request's state in it
    assert torch.equal(first, again)
    single = make_batch([1], slots=[1], fresh=[0], device=device)
    pages.fill_(float("nan"))
    assert bool(mixer.run(kernels, part(inputs, 0, 1), pages, single).isfinite().all())
    assert bool(pages[1].isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_another_dtype_in_a_page_do_not_spread(kernels, device, kind):
    """vllm#35219: float32 states read as keys and values are NaN, and reach every request of the batch."""
    mixer = Mixer(kind)
    lens = [5, 1, 7]
    batch = make_batch(lens, fresh=[0, 1, 2], device=device)
    pages = pages_on(device, make_pages(batch, mixer.state_shape))  # all NaN
    assert not bool(pages.isfinite().any())
    inputs = mixer.inputs(sum(lens))
    inputs["x" if "x" in inputs else "v"][:5] = float("nan")  # one request is broken already
    out = mixer.run(kernels, on(device, inputs), pages, batch)
    assert bool(out[5:].isfinite().all())
    assert bool(pages[batch.slots[1:].tolist()].isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_tail_is_not_saved_as_state(kernels, device, kind):
    """vllm#55178: tokens that only pad the step to a size were computed too, and h(N + K) was kept as h(N)."""
    mixer = Mixer(kind)
    inputs = on(device, mixer.inputs(16))
    exact = make_batch([10], slots=[0], fresh=[0], device=device)
    padded = make_batch([10, 6], slots=[0, -1], fresh=[0], pages=3, device=device)
    wanted = pages_on(device, make_pages(exact, mixer.state_shape))
    found = clone_pages(wanted)
    out = mixer.run(kernels, part(inputs, 0, 10), wanted, exact)
    assert relative_error(mixer.run(kernels, inputs, found, padded)[:10], out) < 1e-6
    assert relative_error(found[0], wanted[0]) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_dummy_step_writes_no_state(kernels, device, kind):
    """vllm#49757: warm-up runs wrote through rows that a step before had left behind."""
    mixer = Mixer(kind)
    owner = make_batch([1], slots=[2], device=device)
    pages = pages_on(device, make_pages(owner, mixer.state_shape, pages=4))
    before = clone_pages(pages)
    dummy = make_batch([1] * 4, slots=[-1] * 4, pages=4, device=device)
    out = mixer.run(kernels, on(device, mixer.inputs(4)), pages, dummy)
    assert torch.equal(pages._base.view(torch.uint8), before._base.view(torch.uint8))
    assert not bool(out.any())


@pytest.mark.parametrize("kind", KINDS)
def test_requests_that_share_nothing_do_not_meet(kernels, device, kind):
    """tpu#2366: an id out of range was clipped, and requests wrote the same state."""
    mixer = Mixer(kind)
    batch = make_batch([1] * 4, slots=[3, 0, 5, 1], device=device)
    pages = pages_on(device, make_pages(batch, mixer.state_shape))
    alone_pages = clone_pages(pages)
    inputs = on(device, mixer.inputs(4))
    mixer.run(kernels, inputs, pages, batch)
    for index, slot in enumerate([3, 0, 5, 1]):
        mixer.run(kernels, part(inputs, index, index + 1), alone_pages, make_batch([1], slots=[slot], device=device))
    assert relative_error(pages[[3, 0, 5, 1]], alone_pages[[3, 0, 5, 1]]) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_twelve_token_prompt_beside_long_ones(kernels, device, kind):
    """vllm#54458: the short prompt is computed as if it were alone."""
    mixer = Mixer(kind)
    lens = [80, 12, 70, 1] if CUDA else [35, 12, 20, 1]
    batch = make_batch(lens, fresh=[0, 1, 2], device=device)
    pages = pages_on(device, make_pages(batch, mixer.state_shape))
    alone_pages = clone_pages(pages)
    inputs = on(device, mixer.inputs(sum(lens)))
    out = mixer.run(kernels, inputs, pages, batch)
    slot = int(batch.slots[1])
    alone = make_batch([12], slots=[slot], fresh=[0], device=device)
    assert (
        relative_error(
            out[lens[0] : lens[0] + 12], mixer.run(kernels, part(inputs, lens[0], lens[0] + 12), alone_pages, alone)
        )
        < 1e-6
    )
    assert relative_error(pages[slot], alone_pages[slot]) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_states_of_many_requests_do_not_bleed_in_a_model_of_half_precision(kernels, device, kind):
    """ik_llama.cpp#1932: with three and more conversations, states bled from one into the other."""
    mixer = Mixer(kind)
    lens = [4, 9, 1, 6, 1]
    batch = make_batch(lens, fresh=[1], device=device)
    pages = pages_on(device, make_pages(batch, mixer.state_shape, dtype=torch.bfloat16))
    inputs = on(device, cast(mixer.inputs(sum(lens)), torch.bfloat16))
    other = {name: value.clone() for name, value in inputs.items()}
    for value in other.values():
        value[4:13] = value[4:13].roll(1, 0)  # only the second request says something else
    other_pages = clone_pages(pages)
    out, changed = mixer.run(kernels, inputs, pages, batch), mixer.run(kernels, other, other_pages, replace(batch))
    assert torch.equal(out[:4], changed[:4])
    assert torch.equal(out[13:], changed[13:])
    rest = [slot for index, slot in enumerate(batch.slots.tolist()) if index != 1]
    assert torch.equal(pages[rest], other_pages[rest])
