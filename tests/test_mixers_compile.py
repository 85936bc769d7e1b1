"""Every launch of the Triton mixers compiles for a CUDA device, which need not be here."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

from mixer_cases import Mixer, cast, make_batch, make_pages

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1", reason="needs triton, not interpreted"
)
HOPPER = 90
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.bool: "*i1",
}
SIZES = {
    "conv": {"C": 256},
    "conv_wide": {"C": 256},
    "mamba2": {"H": 2, "P": 128, "N": 256},
    "mamba2_groups": {"H": 4, "P": 80, "N": 128, "G": 2},
    "mamba1": {"C": 128},
    "gdn": {"H": 2, "Hk": 1, "Dk": 128, "Dv": 128},
    "kda": {"H": 2, "Dk": 128, "Dv": 128},
}


class Compiled:
    """Stands in for a kernel: a launch is compiled as Triton would specialise it, and not run."""

    def __init__(self, kernel, names: list[str]) -> None:
        self.kernel, self.names = kernel, names

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, num_warps=4, num_stages=1, maxnreg=None, **constants):
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature, fixed, attributes = {}, {}, {}
        parameters = self.kernel.arg_names
        for position, name in enumerate(parameters):
            value = args[position] if position < len(args) else constants[name]
            if isinstance(value, torch.Tensor):
                signature[name] = POINTERS[value.dtype]
                attributes[(position,)] = [["tt.divisibility", 16]]
            elif position >= len(args) or value is None or (isinstance(value, int) and value == 1):
                signature[name], fixed[(position,)] = "constexpr", value
            elif isinstance(value, int):
                signature[name] = "i32"
                if value % 16 == 0:
                    attributes[(position,)] = [["tt.divisibility", 16]]
            else:
                signature[name] = "fp32"
        source = ASTSource(self.kernel, signature, fixed, attrs=attributes)
        options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
        built = triton.compile(source, target=GPUTarget("cuda", HOPPER, 32), options=options)
        assert built.asm["cubin"]
        assert built.metadata.shared <= 227 * 1024
        self.names.append(self.kernel.__name__)


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that were compiled."""
    names: list[str] = []
    for module in ("conv", "mamba1", "mamba2", "delta", "kda"):
        host = import_module(f"makeready.hybrid.mixers.triton.{module}")
        device = import_module(f"makeready.hybrid.mixers.triton.kernels.{module}")
        for name in vars(host):
            if type(getattr(device, name, None)).__name__ == "JITFunction":
                monkeypatch.setattr(host, name, Compiled(getattr(device, name), names))
    return names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", SIZES)
def test_launches_compile(launched, kind, dtype):
    from makeready.hybrid.mixers.triton.mixers import TritonMixers

    mixer = Mixer(kind, SIZES[kind])
    lens = [70, 1, 3]
    batch = make_batch(lens)
    pages = make_pages(batch, mixer.state_shape, dtype=dtype if kind.startswith("conv") else torch.float32)
    mixer.run(TritonMixers(), cast(mixer.inputs(sum(lens)), dtype), pages, batch)
    assert len(set(launched)) >= (1 if kind == "mamba1" else 2)
