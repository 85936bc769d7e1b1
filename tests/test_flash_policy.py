import re

import pytest

from makeready.attention_backends.flash import FlashBackend, FlashProvider
from makeready.attention_backends.flash.providers import LIBRARIES, Library, missing
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


def build_request(device):
    spec = AttentionSpec(num_query_heads=4, num_kv_heads=2, head_size=64, head_size_v=64, dtype="bfloat16")
    return BuildRequest(
        device=device, spec=spec, dtype="bfloat16", block_size=64, kernel_block_size=64, num_blocks=8,
        max_num_seqs=2, max_num_batched_tokens=64, max_model_len=256, config=AttentionConfig(),
    )  # fmt: skip


@pytest.mark.parametrize(("device", "preferred"), [(CUDA, 16), (XPU, 64)])
def test_each_platform_has_its_block_multiple_and_preference(device, preferred):
    flash = FlashBackend(providers=())
    assert flash.capabilities(device).kernel_block_multiple == preferred
    assert flash.get_preferred_block_size(device, 16) == preferred
    assert "float32" not in flash.capabilities(device).dtypes


@pytest.mark.parametrize(
    ("device", "library"), [(CUDA, "FlashAttention 3"), (XPU, "vLLM's XPU kernels"), (CPU, "Intel Extension")]
)
def test_without_a_provider_probe_and_build_name_what_is_missing(device, library):
    flash = FlashBackend(providers=())
    probe = flash.probe(device)
    assert not probe.available
    assert library in probe.reason
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
    assert flash.build(build_request(CPU)) is provider


def test_every_provider_says_why_it_does_not_serve():
    flash = FlashBackend(providers=[Invented(available=False), Invented(error="head size 64 is odd")])
    with pytest.raises(BackendError, match=re.escape("no invented here; invented: head size 64 is odd")):
        flash.build(build_request(CPU))


def test_libraries_are_looked_for_without_loading_them():
    cpu = frozenset({"cpu"})
    here = Library(title="A", module="json.decoder", device_types=cpu, install="pip install a")
    gone = Library(title="B", module="json.not_there", device_types=cpu, install="pip install b")
    assert missing(CPU, [here]) == "A is installed (json.decoder) but no provider for it is registered"
    assert missing(CPU, [gone]) == "B is not installed (pip install b)"
    assert missing(XPU, [here, gone]) == ""
    assert {kind for library in LIBRARIES for kind in library.device_types} == {"cpu", "cuda", "xpu"}
