"""On a CUDA device: whatever sizes come, nothing is compiled and nothing captured once an engine is open."""

from __future__ import annotations

import gc
import random

import pytest
import torch

from makeready.benchmarks.launch import random_model
from makeready.benchmarks.launch_shapes import SHAPES
from makeready.engines.transformers.engine import SamplingParams, TransformersEngine
from makeready.startup import prepare

pytestmark = pytest.mark.cuda
LIMITS = {"max_num_seqs": 40, "max_num_batched_tokens": 4096, "max_model_len": 2600, "memory_bytes": 1 << 30}


class Compilations:
    """Counts kernels that Triton compiles or loads, and graphs that Dynamo traces."""

    def __init__(self, monkeypatch):
        from triton.runtime.jit import JITFunction

        for found in gc.get_objects():
            if type(found) is JITFunction:  # isinstance would ask what weak proxies stood for
                found.device_caches.clear()  # another test of this process may have compiled it
        self.kernels: list[str] = []
        compile_one = JITFunction._do_compile

        def counted(kernel, *args, **kwargs):
            self.kernels.append(kernel.__name__)
            return compile_one(kernel, *args, **kwargs)

        monkeypatch.setattr(JITFunction, "_do_compile", counted)

    def take(self):
        from torch._dynamo.utils import counters

        found, self.kernels = (self.kernels, counters["stats"]["unique_graphs"]), []
        return found


def params(new):
    return SamplingParams(max_new_tokens=new, ignore_eos=True)


@pytest.mark.parametrize("graphs", [True, False])
def test_ragged_sizes(graphs, monkeypatch):
    compilations = Compilations(monkeypatch)
    model = random_model("falcon-h1-tiny", "cuda")
    ready = prepare({**SHAPES["falcon-h1-tiny"]}, dtype="bfloat16", cuda_graphs=graphs, **LIMITS)
    engine = TransformersEngine(model, None, ready)
    try:
        kernels, traced = compilations.take()
        assert "mamba2_outputs" in kernels
        assert "prefill_kernel" in kernels
        generator = random.Random(3)
        for lens in (
            [512], [1], [2, 3], [17] * 9, [2500], [2500, 2500, 1, 5], [4, 2000, 130], [129] * 33,
            *([generator.randint(1, 700) for _ in range(generator.randint(1, 50))] for _ in range(6)),
        ):  # fmt: skip
            prompts = [[generator.randrange(3, 200) for _ in range(length)] for length in lens]
            engine.generate(prompts, [params(generator.randint(1, 30)) for _ in lens])
            assert compilations.take() == ([], traced), lens
        torch.cuda.synchronize()
    finally:
        engine.close()
