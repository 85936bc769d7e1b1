import re

import pytest

import makeready
from makeready.attention_backends.flash import FlashBackend, FlashProvider
from makeready.attention_backends.flash.backend import default_providers
from makeready.attention_backends.flash.library import LibraryProvider
from makeready.attention_backends.flash.triton_kernels import TritonProvider
from makeready.attention_backends.interface import BuildRequest, Capabilities, Probe
from makeready.cache.specs import AttentionSpec
from makeready.config import AttentionConfig
from makeready.device import DeviceFacts
from makeready.errors import BackendError

CPU, CUDA, XPU = (DeviceFacts(platform=name, device_type=name) for name in ("cpu", "cuda", "xpu"))


class Invented(FlashProvider):
    name = "invented"
    device_types = frozenset({"cpu"})

    def __init__(self, available=True, error=None):
        self.available, self.error = available, error

    def probe(self, device):
        return Probe(available=self.available, reason="invented 1.0" if self.available else "no invented here")

    def constraints(self, device):
        return Capabilities(
            name="flash (invented)", dtypes=frozenset({"float32"}), kv_cache_dtypes=frozenset({"float32"})
        )

    def build(self, request):
        if self.error:
            raise BackendError(self.error)
        return self


def bare_providers():
    """The package's own, on a machine where nothing is installed."""
    bare = []
    for provider in default_providers():
        if isinstance(provider, TritonProvider):
            bare.append(TritonProvider(version=lambda: None))
        elif isinstance(provider, LibraryProvider):
            bare.append(type(provider)(version_of=lambda name: None, load=None, found=lambda module: False))
        else:
            bare.append(type(provider)(version_of=lambda name: None, load=None))
    return bare


def build_request(device, dtype="bfloat16"):
    spec = AttentionSpec(num_query_heads=4, num_kv_heads=2, head_size=64, head_size_v=64, dtype=dtype)
    return BuildRequest(
        device=device, spec=spec, dtype=dtype, block_size=64, kernel_block_size=64, num_blocks=8,
        max_num_seqs=2, max_num_batched_tokens=64, max_model_len=256, config=AttentionConfig(),
    )  # fmt: skip


@pytest.mark.parametrize(("device", "preferred"), [(CUDA, 16), (XPU, 64)])
def test_each_platform_has_its_block_multiple_and_preference(device, preferred):
    flash = FlashBackend(providers=())
    assert flash.capabilities(device).kernel_block_multiple == preferred
    assert flash.get_preferred_block_size(device, 16) == preferred
    assert "float32" not in flash.capabilities(device).dtypes


@pytest.mark.parametrize(
    ("device", "libraries"),
    [
        (CUDA, ["FlashAttention 3", "FlashAttention 4", "varlen attention", "Triton"]),
        (XPU, ["vllm-xpu-kernels", "Intel Extension", "Triton"]),
        (CPU, ["Intel Extension"]),
    ],
)
def test_probe_and_build_name_every_library_that_is_missing(device, libraries):
    flash = FlashBackend(bare_providers())
    probe = flash.probe(device)
    assert not probe.available
    for library in libraries:
        assert f"{library} is not" in probe.reason or f"{library} for PyTorch is not" in probe.reason
        with pytest.raises(BackendError, match=library):
            flash.build(build_request(device))


def test_a_device_that_nobody_serves_declares_nothing():
    vendor = DeviceFacts(platform="vendor", device_type="privateuseone")
    assert FlashBackend(providers=()).capabilities(vendor).dtypes == frozenset()


def test_a_provider_brings_its_device_type_its_constraints_and_its_build():
    provider = Invented()
    flash = FlashBackend(providers=[provider])
    assert flash.capabilities(CPU).name == "flash (invented)"
    assert flash.probe(CPU) == Probe(available=True, reason="flash by invented: invented 1.0")
    assert flash.build(build_request(CPU, dtype="float32")) is provider


def test_every_provider_says_why_it_does_not_serve():
    flash = FlashBackend(providers=[Invented(available=False), Invented(error="head size 64 is odd")])
    with pytest.raises(BackendError, match=re.escape("no invented here; invented: head size 64 is odd")):
        flash.build(build_request(CPU, dtype="float32"))


def test_latents_are_flashs_in_the_embedded_engine_only():
    """vLLM has other kernels for them, which a plan for it names."""
    kimi = "moonshotai/Kimi-Linear-48B-A3B-Instruct"
    chosen = {
        engine: {layer["backend"] for layer in makeready.plan(kimi, platform="cuda", engine=engine).to_dict()["layers"]}
        for engine in ("transformers", "vllm")
    }
    assert chosen["transformers"] == {"flash", None}
    assert "flash" not in chosen["vllm"]
    assert not FlashBackend().capabilities(CUDA).mla
    assert FlashBackend().for_engine("transformers").capabilities(CUDA).mla
