"""Kernels of libraries behind the mixers' interface: what is declared and refused, and the real ones if installed."""

from __future__ import annotations

import os

import pytest
import torch

from library_autotuners import make_autotuners_work, make_loops_work, take_first_configurations
from makeready.attention_backends.interface import Probe
from makeready.config import AttentionConfig
from makeready.device import DeviceFacts
from makeready.errors import BackendError
from makeready.hybrid.mixers.backend import MixerRequest
from makeready.hybrid.mixers.libraries import CausalConv1dBackend, FlaBackend, MambaSsmBackend
from makeready.hybrid.mixers.reference import ReferenceMixerBackend
from makeready.hybrid.mixers.reference.kernels import ReferenceMixers
from makeready.hybrid.mixers.selection import Probes, choose_mixers
from makeready.hybrid.mixers.triton import TritonMixerBackend
from mixer_cases import Mixer, assert_other_pages_untouched, cast, clone_pages, make_batch, make_pages, relative_error

CUDA, XPU, CPU = (DeviceFacts(platform=name, device_type=name) for name in ("cuda", "xpu", "cpu"))
LIBRARIES = {"fla": FlaBackend, "mamba-ssm": MambaSsmBackend, "causal-conv1d": CausalConv1dBackend}
EVERYTHING = (TritonMixerBackend(), *(made() for made in LIBRARIES.values()), ReferenceMixerBackend())
HERE = {backend.name: Probe(available=True, reason="here") for backend in EVERYTHING}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KINDS = {
    "fla": ("gdn", "kda", "lightning", "conv", "conv_wide"),
    "mamba-ssm": ("mamba2", "mamba2_groups"),
    "causal-conv1d": ("conv", "conv_wide"),
}
SIZES = {
    "gdn": {"H": 32, "Hk": 16, "Dk": 128, "Dv": 128},
    "kda": {"H": 32, "Dk": 128, "Dv": 128},
    "lightning": {"H": 4, "Dk": 128, "Dv": 128},
    "conv": {"C": 3584},
    "conv_wide": {"C": 3584},
    "mamba2": {"H": 24, "P": 128, "N": 256},
    "mamba2_groups": {"H": 16, "P": 80, "N": 128, "G": 8},
}


def asking(*kinds: str) -> tuple[MixerRequest, ...]:
    return tuple(
        MixerRequest(layer=layer, kind=kind, dtype="bfloat16", state_dtypes=("bfloat16", "float32"))
        for layer, kind in enumerate(kinds)
    )


@pytest.fixture
def _compiled(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.usefixtures("_compiled")
class TestChoice:
    def test_auto_stays_on_triton(self):
        for kind in ("gdn", "kda", "mamba2", "shortconv"):
            chosen = choose_mixers(asking(kind), EVERYTHING, CUDA, probes=HERE)
            assert chosen is not None
            assert chosen.backend.name == "triton"

    def test_a_library_that_is_asked_serves_or_says_which_operator_it_lacks(self):
        chosen = choose_mixers(asking("kda"), EVERYTHING, CUDA, asked="fla", probes=HERE)
        assert chosen is not None
        assert chosen.backend.name == "fla"
        with pytest.raises(BackendError, match="fla has no mamba2: it has layers for it that call mamba-ssm"):
            choose_mixers(asking("mamba2"), EVERYTHING, CUDA, asked="fla", probes=HERE)
        with pytest.raises(BackendError, match="mamba-ssm has no mamba1: its selective_scan_fn takes no packed"):
            choose_mixers(asking("mamba2", "mamba1"), EVERYTHING, CUDA, asked="mamba-ssm", probes=HERE)
        with pytest.raises(BackendError, match="causal-conv1d has no gdn: it computes the convolution alone"):
            choose_mixers(asking("gdn"), EVERYTHING, CUDA, asked="causal-conv1d", probes=HERE)
        with pytest.raises(BackendError, match="fla has no kernels for this device"):
            choose_mixers(asking("gdn"), EVERYTHING, CPU, asked="fla", probes=HERE)

    def test_without_triton_auto_falls_back_with_every_reason(self):
        lacking = {name: Probe(available=False, reason=f"{name} is not installed") for name in HERE}
        chosen = choose_mixers(asking("gdn"), EVERYTHING, CUDA, probes={**lacking, "reference": HERE["reference"]})
        assert chosen is not None
        assert chosen.backend.name == "reference"
        said = " ".join(chosen.refusals)
        for reason in ("triton is not installed", "fla is not installed", "mamba-ssm has no gdn"):
            assert reason in said

    def test_float32_tokens_are_refused(self):
        wide = MixerRequest(layer=0, kind="gdn", dtype="float32", state_dtypes=("float32",))
        with pytest.raises(BackendError, match="fla computes in bfloat16, float16, and the layers in float32"):
            choose_mixers((wide,), EVERYTHING, CUDA, asked="fla", probes=HERE)

    def test_batch_invariance_refuses_libraries_by_name(self):
        for name, kind in (("fla", "gdn"), ("mamba-ssm", "mamba2"), ("causal-conv1d", "shortconv")):
            said = f"batch_invariant is asked, and what {name} computes for a request depends on the batch"
            with pytest.raises(BackendError, match=said):
                choose_mixers(asking(kind), EVERYTHING, CUDA, asked=name, batch_invariant=True, probes=HERE)
            chosen = choose_mixers(asking(kind), EVERYTHING, CUDA, batch_invariant=True, probes=HERE)
            assert chosen is not None
            assert chosen.backend.name == "triton"

    def test_the_reference_is_invariant_once_it_is_asked(self):
        with pytest.raises(BackendError, match="what reference computes for a request depends on the batch"):
            choose_mixers(asking("gdn"), EVERYTHING, CPU, asked="reference", batch_invariant=True, probes=HERE)
        config = AttentionConfig(batch_invariant=True)
        offered = [backend.configured(config, CPU) for backend in EVERYTHING]
        chosen = choose_mixers(asking("gdn"), offered, CPU, batch_invariant=True, probes=HERE)
        assert chosen is not None
        assert chosen.backend.build(CPU).alone

    def test_fla_asks_for_blocks_of_whole_chunks_on_xpu(self):
        chosen = choose_mixers(asking("gdn"), EVERYTHING, XPU, asked="fla", probes=HERE)
        assert chosen is not None
        (constraint,) = chosen.constraints
        assert constraint.accepts(128)
        assert not constraint.accepts(528)
        assert "fla" in constraint.owner
        for kind, device in (("gdn", CUDA), ("shortconv", XPU)):
            assert choose_mixers(asking(kind), EVERYTHING, device, asked="fla", probes=HERE).constraints == ()

    def test_a_library_is_not_imported_unless_selection_comes_to_it(self):
        def fails(module, name):
            raise AssertionError(f"{module} was loaded")

        backends = (TritonMixerBackend(), FlaBackend(lambda name: "0.6.0", fails, lambda module: True))
        chosen = choose_mixers(asking("gdn"), backends, CUDA, probes=Probes(backends, CUDA))
        assert chosen is not None
        assert chosen.backend.name == "triton"


@pytest.mark.parametrize("name", LIBRARIES)
def test_steps_with_prefill_are_not_captured_around_a_library(name):
    backend = LIBRARIES[name]()
    kernels = backend.kernels(dict.fromkeys(backend.functions, print))
    assert kernels.capturable, "decodes stay on our kernels"
    assert not kernels.captures_ragged, "it must know on the host who has how many tokens"


class TestProbe:
    def test_every_way_of_not_being_there_is_named(self):
        def broken(module, name):
            raise ImportError("libcudart.so.12: cannot open shared object file")

        def renamed(q, k, v):
            return None

        for made, said in (
            (FlaBackend(lambda name: None, broken, lambda module: False), r"is not installed \(pip install fla-core"),
            (FlaBackend(lambda name: "0.4.1", broken, lambda module: True), r"0.4.1 is older than 0.6"),
            (
                MambaSsmBackend(lambda name: "2.3.2", broken, lambda module: True),
                "2.3.2 does not load: ImportError: libc",
            ),
            (
                FlaBackend(lambda name: "0.6.0", lambda *_: renamed, lambda module: True),
                "chunk_gated_delta_rule without",
            ),
        ):
            probe = made.probe(CUDA)
            assert not probe.available
            with pytest.raises(BackendError, match=said):
                made.build(CUDA)

    @pytest.mark.usefixtures("_compiled")
    def test_devices_without_kernels_are_told_before_anything_is_imported(self):
        probe = MambaSsmBackend().probe(XPU)
        assert probe == Probe(available=False, reason="mamba-ssm has kernels for cuda, not for xpu")

    @pytest.mark.parametrize("name", LIBRARIES)
    def test_what_is_installed_has_the_parameters_that_we_pass(self, name):
        backend = LIBRARIES[name]()
        if not all(backend._found(wanted.module) for wanted in backend.functions.values()):
            pytest.skip(f"{backend.title} is not installed")
        probe = backend.probe(CUDA)
        assert probe.available, probe.reason
        assert backend.version() in probe.reason


@pytest.fixture
def library(request):
    """The kernels of an installed library that can run here."""
    if DEVICE == "cpu" and not INTERPRETED:
        pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1")
    if DEVICE == "cpu" and request.param != "fla":
        pytest.skip(f"{request.param} launches on a CUDA device")
    backend = LIBRARIES[request.param]()
    if not all(backend._found(wanted.module) for wanted in backend.functions.values()):
        pytest.skip(f"{backend.title} is not installed")
    take_first_configurations()
    if DEVICE == "cpu":
        make_autotuners_work()
    probe = backend.probe(CUDA)
    if not probe.available:
        pytest.skip(probe.reason)
    kernels = backend.build(CUDA)
    if DEVICE == "cpu":
        make_loops_work()
    return kernels


@pytest.mark.parametrize(
    ("library", "kind"), [(name, kind) for name, kinds in KINDS.items() for kind in kinds], indirect=["library"]
)
def test_ragged_steps_equal_the_reference(library, kind):
    """Decodes and prefills together, states of other requests and memory between pages full of NaN."""
    big = DEVICE == "cuda"
    dtype = torch.bfloat16 if big else torch.float32
    mixer = Mixer(kind, SIZES[kind] if big else {"Dk": 32, "Dv": 32})
    steps = (
        ([1, 129, 12, 1, 300, 64, 2, 90], [1, 4], [5]),
        ([130, 70], [0], []),
        ([3, 1, 200, 1, 90], [2], []),
        ([1] * 5, [0], [2]),
    )
    if not big:
        steps = (([1, 9, 3, 1, 70, 2], [1, 3], [2]), ([1] * 3, [0], [2]))
    for lens, fresh, padding in steps:
        for state_dtype in (torch.float32, torch.bfloat16) if big else (torch.float32,):
            batch = make_batch(lens, fresh=fresh)
            for index in padding:
                batch.slots[index] = -1
            state = make_pages(batch, mixer.state_shape, dtype=state_dtype)
            wanted_state, pages = clone_pages(state, torch.float32), _to_device(state)
            inputs = cast(mixer.inputs(sum(lens)), dtype)
            wanted = mixer.run(ReferenceMixers(), cast(inputs, torch.float32), wanted_state, batch)
            on_device = make_batch(lens, fresh=fresh, slots=batch.slots.tolist(), device=DEVICE)
            before = clone_pages(pages)
            out = mixer.run(library, {name: value.to(DEVICE) for name, value in inputs.items()}, pages, on_device)
            allowed = 2e-2 if big else 2e-5
            assert relative_error(out, wanted) < allowed
            used = [slot for slot in batch.slots.tolist() if slot >= 0]
            assert relative_error(pages[used], wanted_state[used]) < allowed
            assert_other_pages_untouched(before, pages, batch)
            for index in padding:
                start = sum(lens[:index])
                assert not out[start : start + lens[index]].any()


def _to_device(state):
    whole = state._base.to(DEVICE, copy=True)
    return whole.as_strided(state.shape, state.stride(), state.storage_offset())
