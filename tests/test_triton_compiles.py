"""Every configuration of the table compiles for its devices, without one: launches are recorded and compiled ahead."""

from __future__ import annotations

import pytest
import torch

from paged_cases import make_case

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from makeready.attention_backends.flash.triton_kernels import configs, latent_launch, launch
from makeready.attention_backends.flash.triton_kernels.impl import TritonImpl
from makeready.attention_backends.interface import AttentionCall, BuildRequest
from makeready.cache import write_triton
from makeready.cache.specs import AttentionSpec
from makeready.config import AttentionConfig
from makeready.device import DeviceFacts

TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64",
    torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip
HOPPER = DeviceFacts(platform="cuda", device_type="cuda", compute_capability=(9, 0), compute_units=132)
AMPERE = DeviceFacts(platform="cuda", device_type="cuda", compute_capability=(8, 0), compute_units=108)
SHARED = {HOPPER: 232_448, AMPERE: 101_376}
"""Bytes of shared memory that a program may have; of the devices like Ampere the smallest, 8.6 and 8.9."""


class Compiled:
    """Stands in for a kernel: a launch compiles it for ``device`` and keeps what came out."""

    def __init__(self, kernel, device, found):
        self.kernel, self.device, self.found = kernel, device, found

    def __getitem__(self, grid):
        return self._launch

    def _launch(self, *args, **kwargs):
        options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
        given = {**dict(zip(self.kernel.arg_names, args, strict=False)), **kwargs}
        constants = {name: x for name, x in given.items() if name.isupper() or x is None}
        signature = {name: "constexpr" if name in constants else type_of(x) for name, x in given.items()}
        order = self.kernel.arg_names
        aligned = {
            (order.index(name),): [["tt.divisibility", 16]]
            for name, x in given.items()
            if name not in constants and (isinstance(x, torch.Tensor) or (isinstance(x, int) and x % 16 == 0))
        }
        source = ASTSource(
            fn=self.kernel, signature={name: signature[name] for name in order}, constexprs=constants, attrs=aligned
        )
        major, minor = self.device.compute_capability
        compiled = triton.compile(source, target=GPUTarget("cuda", major * 10 + minor, 32), options=options)
        self.found.append((self.kernel.__name__, compiled))


def type_of(x):
    if isinstance(x, torch.Tensor):
        return "*" + TYPES[x.dtype]
    if hasattr(x, "block_shape"):
        return f"tensordesc<{TYPES[x.base.dtype]}{x.block_shape}>"
    return "fp32" if isinstance(x, float) else "i32"


@pytest.fixture
def compiled_for(monkeypatch):
    def prepare(device):
        found = []
        for module, names in (
            (launch, ("plan_kernel", "decode_kernel", "gather_kernel", "prefill_kernel")),
            (write_triton, ("write_kernel",)),
            (latent_launch, ("latent_kernel", "latent_sum_kernel")),
        ):
            for name in names:
                monkeypatch.setattr(module, name, Compiled(getattr(module, name), device, found))
        return found

    return prepare


def run(device, head_size, queries, *, invariant=False, narrow=False, seq_lens=(300, 300), **numbers):
    case = make_case(
        seq_lens, queries, heads=(8, 2), head_size=head_size, dtype=torch.bfloat16, block_size=16, clear=False
    )
    spec = AttentionSpec(
        num_query_heads=8, num_kv_heads=2, head_size=head_size, head_size_v=head_size,
        dtype="fp8_e4m3" if narrow else "bfloat16",
    )  # fmt: skip
    request = BuildRequest(
        device=device, spec=spec, dtype="bfloat16", block_size=16, kernel_block_size=16, num_blocks=64, max_num_seqs=8,
        max_num_batched_tokens=512, max_model_len=4096, config=AttentionConfig(batch_invariant=invariant),
    )  # fmt: skip
    attention = TritonImpl(request, 132)
    caches = (case.key_cache, case.value_cache)
    key, value = (cache.to(torch.float8_e4m3fn) for cache in caches) if narrow else caches
    call = AttentionCall(scale=0.1, **numbers)
    attention.forward(case.query, key, value, attention.prepare(case.step), call)


def fits(found, device, kernels):
    assert {name for name, _ in found} == set(kernels)
    for name, compiled in found:
        assert compiled.metadata.shared <= SHARED[device], name


@pytest.mark.parametrize(
    ("device", "head_size", "invariant"),
    [
        (HOPPER, 64, False), (HOPPER, 128, False), (HOPPER, 256, False), (HOPPER, 128, True), (HOPPER, 256, True),
        (AMPERE, 128, False), (AMPERE, 256, True),
    ],
)  # fmt: skip
def test_decode_and_prefill(device, head_size, invariant, compiled_for):
    found = compiled_for(device)
    run(device, head_size, (1, 300), invariant=invariant)
    fits(found, device, ["plan_kernel", "decode_kernel", "gather_kernel", "prefill_kernel"])
    products = [compiled.asm["ptx"] for name, compiled in found if name == "prefill_kernel"]
    assert all(("wgmma" in ptx) == (device is HOPPER) for ptx in products)


@pytest.mark.parametrize(("device", "head_size"), [(HOPPER, 128), (HOPPER, 256), (AMPERE, 256)])
def test_a_few_query_tokens_and_pages(device, head_size, compiled_for):
    found = compiled_for(device)
    run(device, head_size, (9, 60))
    fits(found, device, ["plan_kernel", "decode_kernel", "prefill_kernel"])


def test_one_byte_numbers(compiled_for):
    found = compiled_for(HOPPER)
    run(HOPPER, 128, (1, 300), narrow=True)
    fits(found, HOPPER, ["plan_kernel", "decode_kernel", "gather_kernel", "prefill_kernel"])


def test_every_feature_at_once(compiled_for):
    found = compiled_for(HOPPER)
    numbers = {"sliding_window": 99, "soft_cap": 9.0, "sinks": torch.ones(8), "alibi_slopes": torch.ones(8)}
    run(HOPPER, 96, (1, 300), **numbers)
    fits(found, HOPPER, ["plan_kernel", "decode_kernel", "gather_kernel", "prefill_kernel"])


@pytest.mark.parametrize("device", [HOPPER, AMPERE])
def test_latents(device, compiled_for):
    found = compiled_for(device)
    case = make_case(
        (900, 300), (1, 9), heads=(32, 1), head_size=512, head_size_v=64, dtype=torch.bfloat16, clear=False
    )
    spec = AttentionSpec(num_query_heads=32, num_kv_heads=1, head_size=512, head_size_v=64, dtype="bfloat16", mla=True)
    request = BuildRequest(
        device=device, spec=spec, dtype="bfloat16", block_size=16, kernel_block_size=16, num_blocks=64, max_num_seqs=8,
        max_num_batched_tokens=512, max_model_len=4096, config=AttentionConfig(),
    )  # fmt: skip
    attention = TritonImpl(request, 132)
    query = torch.randn(10, 32, 576).bfloat16()
    pages = (case.key_cache, case.value_cache)
    attention.forward_latent(query, *pages, attention.prepare(case.step), AttentionCall(scale=0.1))
    fits(found, device, ["latent_kernel", "latent_sum_kernel"])


def test_writing(compiled_for):
    found = compiled_for(HOPPER)
    key, value = (torch.randn(64, 2, 96).bfloat16() for _ in range(2))
    caches = [torch.zeros(9, 16, 2, 96, dtype=torch.float8_e4m3fn) for _ in range(2)]
    angles = torch.rand(64, 32)
    write_triton.write_rows(key, value, *caches, torch.arange(64), scales=(1.0, 2.0), rotary=(angles, angles))
    write_triton.write_rows(key, value, *(cache.bfloat16() for cache in caches), torch.arange(64))
    fits(found, HOPPER, ["write_kernel"])
    clamped, plain = (compiled.asm["ptx"] for _, compiled in found)
    assert "max.NaN.f32" in clamped, "NaN would be stored as the least number of the cache's dtype"
    assert "min.NaN.f32" in clamped
    assert "max." not in plain


def test_the_table_has_an_entry_for_every_head_size():
    for device in (HOPPER, AMPERE, DeviceFacts(platform="xpu", device_type="xpu")):
        for head_size in (16, 64, 80, 128, 192, 256):
            facts = {"narrow": False, "invariant": False, "max_model_len": 4096}
            assert configs.decode_config(device, head_size=head_size, rows=16, **facts).tile >= 16


def test_the_batch_invariant_mode_adds_the_same_tiles_wherever_a_token_is_computed():
    for entry in configs.TABLE:
        assert entry.invariant.tile == entry.invariant_prefill.block_n
