"""Kernels of state layers are chosen and refused as attention backends are."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import makeready
from makeready.attention_backends.interface import Capabilities, Probe
from makeready.cache.specs import LayerSpec, MambaSpec, StateTensor
from makeready.device import DeviceFacts
from makeready.errors import BackendError
from makeready.hybrid.mixers.backend import MixerBackend, MixerRequest
from makeready.hybrid.mixers.reference import ReferenceMixerBackend
from makeready.hybrid.mixers.selection import choose_mixers, mixer_requests
from makeready.hybrid.mixers.triton import TritonMixerBackend
from makeready.plugins.doctor import examine
from makeready.plugins.hookspecs import hookimpl
from makeready.plugins.manager import load_plugins

CPU, CUDA, XPU = (DeviceFacts(platform=name, device_type=name) for name in ("cpu", "cuda", "xpu"))
BUILT_IN = (ReferenceMixerBackend(), TritonMixerBackend())
BUILT_IN_NAMES = ["triton", "fla", "mamba-ssm", "causal-conv1d", "reference"]
REQUESTS = (
    MixerRequest(layer=0, kind="mamba2", dtype="bfloat16", state_dtypes=("bfloat16", "float32")),
    MixerRequest(layer=2, kind="gdn", dtype="bfloat16", state_dtypes=("bfloat16", "float32")),
)
HERE = {"triton": Probe(available=True, reason="here"), "reference": Probe(available=True, reason="here")}


@pytest.fixture(autouse=True)
def _compiled(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


class OnlyMamba(MixerBackend):
    name = "vendor"

    def capabilities(self, device):
        return Capabilities(
            name="vendor", dtypes=frozenset({"float16"}), kv_cache_dtypes=frozenset({"float16"}), is_ssm=True
        )

    def mixers(self, device):
        return frozenset({"mamba2"})

    def probe(self, device):
        return Probe(available=False, reason="vendor needs libvendor, which is not here")

    def build(self, device):
        raise NotImplementedError


def test_auto_takes_triton_where_it_compiles_and_the_reference_elsewhere():
    for device, name in ((CUDA, "triton"), (XPU, "triton"), (CPU, "reference")):
        chosen = choose_mixers(REQUESTS, BUILT_IN, device, probes=HERE)
        assert chosen is not None
        assert chosen.backend.name == name
        assert chosen.capabilities.is_ssm
    assert chosen.reasons == ("mixers: layers 0, 2: reference, the first on cpu that can serve.",)
    said = "triton cannot compute the states of layers 0, 2: triton has no kernels for this device"
    assert chosen.refusals == (said,)


def test_a_missing_triton_is_a_refusal_with_its_reason():
    probes = {**HERE, "triton": Probe(available=False, reason="triton needs triton, which is not installed")}
    chosen = choose_mixers(REQUESTS, BUILT_IN, CUDA, probes=probes)
    assert chosen is not None
    assert chosen.backend.name == "reference"
    assert "which is not installed" in chosen.refusals[0]


def test_an_explicit_request_serves_or_is_refused():
    chosen = choose_mixers(REQUESTS, BUILT_IN, CUDA, asked="reference", probes=HERE)
    assert chosen is not None
    assert chosen.reasons == ("mixers: layers 0, 2: reference, as asked.",)
    with pytest.raises(BackendError, match="'triton' was asked for, and triton cannot compute .* no kernels"):
        choose_mixers(REQUESTS, BUILT_IN, CPU, asked="triton", probes=HERE)
    with pytest.raises(BackendError, match="'fla' is not known on cuda; known are auto, reference, triton"):
        choose_mixers(REQUESTS, BUILT_IN, CUDA, asked="fla", probes=HERE)


def test_every_reason_of_a_refusal_is_told():
    with pytest.raises(BackendError) as caught:
        choose_mixers(REQUESTS, (OnlyMamba(),), CUDA, asked="vendor", probes={"vendor": OnlyMamba().probe(CUDA)})
    for reason in (
        "vendor has no gdn",
        "vendor computes in float16, and the layers in bfloat16",
        "vendor keeps states in float16, and the cache holds float32",
        "vendor needs libvendor, which is not here",
    ):
        assert reason in caught.value.message


def test_layers_that_mix_by_themselves_ask_nothing():
    conv = StateTensor(name="conv", shape=(8, 4), dtype="float32")
    layers = [LayerSpec(layer=n, spec=MambaSpec(kind=kind, states=(conv,))) for n, kind in enumerate(("own", "kda"))]
    requests = mixer_requests(layers, "float32")
    assert [(request.layer, request.kind) for request in requests] == [(1, "kda")]
    assert choose_mixers((), BUILT_IN, CPU) is None


class VendorPlugin:
    @hookimpl
    def makeready_mixer_backends(self, device):
        return (OnlyMamba(),)


class RivalPlugin:
    @hookimpl
    def makeready_mixer_backends(self, device):
        return (replace_name(OnlyMamba(), "triton"),)


class WrongPlugin:
    @hookimpl
    def makeready_mixer_backends(self, device):
        return ("triton",)


def replace_name(backend, name):
    backend.name = name
    return backend


def test_plugins_bring_kernels_and_rivals_are_named():
    plugins = load_plugins(entry_points=(), extra=(("vendor", VendorPlugin()),))
    assert [offer.backend.name for offer in plugins.mixer_backends(CUDA).offered] == [*BUILT_IN_NAMES, "vendor"]
    for plugin, said in ((RivalPlugin(), "triton"), (WrongPlugin(), "makeready_mixer_backends")):
        offers = load_plugins(entry_points=(), extra=(("other", plugin),)).mixer_backends(CUDA)
        assert [offer.backend.name for offer in offers.offered] == BUILT_IN_NAMES
        assert said in offers.problems[0].sentence()


def test_plans_and_prepared_engines_name_their_mixers():
    plan = makeready.plan("granite-4.0-h-tiny", platform="cuda", mixer_backend="triton", engine="transformers")
    assert any(reason.startswith("mixers: ") and "triton, as asked" in reason for reason in plan.reasons)
    with pytest.raises(BackendError, match="mixer_backend 'triton' was asked for"):
        makeready.plan("granite-4.0-h-tiny", platform="cpu", mixer_backend="triton")
    ready = makeready.prepare(platform="cpu", num_blocks=16)
    assert ready.mixers is not None
    assert ready.mixers.name == "reference"


def test_what_kernels_ask_of_blocks_reaches_the_solver():
    asked = {"platform": "xpu", "engine": "transformers", "device_memory_bytes": 300 << 30}
    plan = makeready.plan("Qwen/Qwen3-Next-80B-A3B-Instruct", mixer_backend="fla", **asked)
    assert plan.block_size % 64 == 0
    assert any("fla's delta rule on xpu needs a multiple of 64" in reason for reason in plan.reasons)
    with pytest.raises(BackendError, match="batch_invariant is asked, and what fla computes"):
        makeready.plan("Qwen/Qwen3-Next-80B-A3B-Instruct", mixer_backend="fla", batch_invariant=True, **asked)


def test_doctor_shows_mixers():
    report = examine(load_plugins()).to_dict()
    cpu = next(platform for platform in report["platforms"] if platform["name"] == "cpu")
    by_name = {mixers["name"]: mixers for mixers in cpu["mixers"]}
    assert by_name["reference"]["available"]
    assert by_name["triton"]["reason"].startswith("triton ")
    assert not by_name["triton"]["available"]
    assert by_name["fla"]["reason"] == "flash-linear-attention has kernels for cuda, xpu, not for cpu"
    assert list(by_name) == BUILT_IN_NAMES


def test_choosing_imports_neither_torch_nor_triton():
    code = (
        "import sys, json\n"
        "from makeready.plugins.manager import load_plugins\n"
        "from makeready.device import DeviceFacts\n"
        "load_plugins().mixer_backends(DeviceFacts(platform='cuda', device_type='cuda'))\n"
        "print(json.dumps([name for name in ('torch', 'triton') if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
