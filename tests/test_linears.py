"""Linear layers merged in what is compiled, and their kernels for few tokens, against torch's own products."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from torch.fx import symbolic_trace

from makeready.engines.transformers.packed import linears as merged
from makeready.engines.transformers.packed.merging import merge_linears

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HERE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if HERE == "cuda" else torch.float16  # Triton's interpreter takes bfloat16 for whole numbers
kernels = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not (INTERPRETED or HERE == "cuda"),
    reason="needs Triton with a CUDA device or TRITON_INTERPRET=1",
)


class Attention(torch.nn.Module):
    """Three layers that read one tensor, and one that reads another."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(8, n, bias=bias) for n in (12, 4, 4))
        self.o = torch.nn.Linear(12, 8, bias=False)

    def forward(self, x):
        return (
            self.o(torch.nn.functional.linear(x, self.q.weight, self.q.bias) + 1.0) + self.k(x).sum() + self.v(x).sum()
        )


def traced(module):
    """What Dynamo hands to a backend: parameters as inputs, example values noted."""
    captured = []

    def backend(graph, inputs):
        captured.append(graph)
        return graph

    return captured, torch.compile(module, backend=backend, fullgraph=True)


@pytest.mark.parametrize(("alone", "expected"), [(False, 1), (True, 2)])
def test_layers_that_share_their_input_become_one_operator(alone, expected):
    torch._dynamo.reset()
    module, x = Attention(), torch.randn(3, 8)
    captured, compiled = traced(module)
    expected_output = compiled(x)
    graph = captured[0]
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    assert merge_linears(graph, alone=alone) == expected
    values = dict(module.named_parameters())
    given = [_value(node, values, x) for node in placeholders]
    torch.testing.assert_close(graph(*given)[0], expected_output)


def _value(node, parameters, x):
    shape = tuple(node.meta["example_value"].shape)
    found = [
        p for name, p in parameters.items() if name.split(".")[0] in str(node.target).split("_") and p.shape == shape
    ]
    return found[0] if found else x


class Gated(torch.nn.Module):
    """A gated pair and a residual, as most MLPs have them, with a factor that is one."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (torch.nn.Linear(a, b, bias=False) for a, b in ((8, 12), (8, 12), (12, 8)))

    def forward(self, x):
        return x + self.down(torch.nn.functional.silu(self.gate(x) * 1.0) * self.up(x)) * 1.0


@pytest.mark.parametrize("alone", [False, True])
def test_residuals_are_added_along_for_one_token(alone):
    torch._dynamo.reset()
    made = []

    def backend(graph, inputs):
        merge_linears(graph, alone=alone)
        made.extend(str(node.target) for node in graph.graph.nodes if "makeready" in str(node.target))
        return graph

    module, x = Gated(), torch.randn(1, 8)
    torch.testing.assert_close(torch.compile(module, backend=backend, fullgraph=True)(x), module(x))
    expected = ["makeready.linears.default", "makeready.linear_add.default"]
    assert made == (expected if alone else expected[:1])


def test_a_tensor_that_is_written_to_is_read_where_it_was():
    torch._dynamo.reset()

    def changing(x, a, b):
        first = torch.nn.functional.linear(x, a)
        x.mul_(2.0)
        return first + torch.nn.functional.linear(x, b)

    def backend(graph, inputs):
        assert merge_linears(graph, alone=True) == 0
        return graph

    x, a, b = torch.randn(2, 8), torch.randn(4, 8), torch.randn(4, 8)
    expected = changing(x.clone(), a, b)
    torch.testing.assert_close(torch.compile(changing, backend=backend, fullgraph=True)(x.clone(), a, b), expected)


def test_layers_with_a_bias_stay_as_they_are():
    torch._dynamo.reset()
    captured, compiled = traced(Attention(bias=True))
    compiled(torch.randn(3, 8))
    assert merge_linears(captured[0], alone=False) == 0


def test_a_graph_without_linear_layers_is_left_alone():
    graph = symbolic_trace(torch.nn.ReLU())
    assert merge_linears(graph, alone=True) == 0


@kernels
@pytest.mark.parametrize("tokens", [1, 2, 7, 16, 17, 33, 64])
@pytest.mark.parametrize("rows", [(40,), (100, 36, 8), (64, 64, 1, 200)])
@pytest.mark.parametrize("columns", [512, 1024, 1536])
def test_kernels_compute_what_linear_does(tokens, rows, columns):
    from makeready.engines.transformers.packed import linear_kernels

    torch.manual_seed(tokens)
    x = torch.randn(tokens, columns + 8, dtype=DTYPE, device=HERE)[:, :columns]
    weights = [torch.randn(n, columns, dtype=DTYPE, device=HERE) / columns**0.5 for n in rows]
    tiles = linear_kernels.tiles_for(tokens, sum(rows), columns)
    assert tiles is not None
    for output, weight in zip(linear_kernels.launch(x, weights, tiles), weights, strict=True):
        expected = x.float() @ weight.float().T
        assert (output.float() - expected).norm() / expected.norm() < 5e-3


@kernels
@pytest.mark.parametrize(("rows", "columns"), [(40, 512), (100, 1536), (33, 1024), (6001, 512)])
def test_kernels_of_one_token_add_residuals(rows, columns):
    from makeready.engines.transformers.packed import linear_kernels

    x = torch.randn(1, columns, dtype=DTYPE, device=HERE)
    weight = torch.randn(rows, columns, dtype=DTYPE, device=HERE) / columns**0.5
    residual = torch.randn(1, rows, dtype=DTYPE, device=HERE)
    tiles = linear_kernels.tiles_for(1, rows, columns)
    added = linear_kernels.launch(x, [weight], tiles, residual)[0].float()
    expected = residual.float() + x.float() @ weight.float().T
    assert (added - expected).norm() / expected.norm() < 1e-2


def test_large_matrices_and_many_tokens_have_their_own_ways():
    pytest.importorskip("triton")
    from makeready.engines.transformers.packed.linear_kernels import tiles_for

    assert tiles_for(1, 24576, 3072) != tiles_for(1, 3072, 3072)
    assert tiles_for(65, 8192, 3072) is None
    assert tiles_for(8, 8192, 100) is None
    x, weight = torch.randn(2, 3, 8), torch.randn(5, 8)
    torch.testing.assert_close(merged.linears(x, [weight])[0], x @ weight.T)


@pytest.mark.parametrize("change", ["product", "value"])
def test_a_factor_of_one_stays_where_something_is_written(change):
    """A product is a copy: what is written into one of the two must not reach the other."""

    def forward(x):
        value = x + 0.0
        product = value * 1.0
        changed = product if change == "product" else value
        changed += 1.0
        return value, product

    torch._dynamo.reset()
    captured, compiled = traced(forward)
    expected = compiled(torch.zeros(3))
    merge_linears(captured[0], alone=False)
    captured[0].recompile()
    for found, wanted in zip(captured[0](torch.zeros(3)), expected, strict=True):
        assert torch.equal(found, wanted)
