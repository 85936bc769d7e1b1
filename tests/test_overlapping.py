"""Attention that a layer's state mixers do not need begins before them and ends where it was."""

from __future__ import annotations

import operator
import weakref

import pytest
import torch
from torch.fx import Graph, GraphModule

from engine_setup import make_ready
from makeready.engines.transformers.engine import SamplingParams, TransformersEngine
from makeready.engines.transformers.packed import compiling, opening
from makeready.engines.transformers.packed import ops as packed_ops
from makeready.engines.transformers.packed.context import ForwardContext, forward_of
from makeready.engines.transformers.packed.ops import operators
from makeready.engines.transformers.packed.overlapping import overlap_attention
from makeready.errors import IntegrityError
from tiny_models import tiny_model

GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)
CALL = (None, 1.0, True, None, None)


def layer(
    *,
    fed_by_mixer: bool = False,
    feeds_mixer: bool = False,
    writes: bool = False,
    adds: bool = False,
    twice: bool = False,
) -> GraphModule:
    """A parallel hybrid's layer: a convolution, then attention over what rotary makes of x, then their sum."""
    ops, graph = operators(), Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    if feeds_mixer:
        early = graph.call_function(ops.attention.default, (x, x, x, *CALL))
    mixed = graph.call_function(ops.causal_conv.default, (early if feeds_mixer else x, weight, None, None))
    if writes:
        graph.call_method("mul_", (x, 2.0))
    if adds:
        graph.call_function(operator.iadd, (x, mixed))
    turned = graph.call_function(torch.cos, (mixed if fed_by_mixer else x,))
    attended = early if feeds_mixer else graph.call_function(ops.attention.default, (turned, x, x, *CALL))
    if twice:
        attended = graph.call_function(
            torch.add, (graph.call_function(ops.attention.default, (x, x, x, *CALL)), attended)
        )
    graph.output(graph.call_function(torch.add, (mixed, attended)))
    return GraphModule(torch.nn.Module(), graph)


def names(module: GraphModule) -> list[str]:
    return [
        getattr(node.target, "__name__", str(node.target)).removesuffix(".default")
        for node in module.graph.nodes
        if node.op == "call_function"
    ]


def test_attention_begins_before_the_mixer_and_ends_where_it_was():
    module = layer()
    assert names(module) == ["causal_conv", "cos", "attention", "add"]
    assert overlap_attention(module) == 1
    assert names(module) == ["cos", "attention_begin", "causal_conv", "attention_end", "add"]
    begun, ended = (node for node in module.graph.nodes if "attention" in str(node.target))
    assert ended.args == (begun,)


def test_what_attention_reads_aside_lives_until_it_ends(monkeypatch):
    monkeypatch.setattr(packed_ops, "_attention", lambda query, *_: query * 2)
    with forward_of(ForwardContext(None, None, None)):
        ops, query, key, value = operators(), *(torch.ones(3, 2, 4) for _ in range(3))
        read = [weakref.ref(tensor) for tensor in (query, key, value)]
        begun = ops.attention_begin(query, key, value, *CALL)
        assert begun.shape == (0, 3, 2, 4)
        del query, key, value
        assert all(tensor() is not None for tensor in read), "the allocator would give their memory to others"
        with pytest.raises(IntegrityError, match="before another has ended"):
            ops.attention_begin(*(torch.ones(1, 2, 4),) * 3, *CALL)
        assert torch.equal(ops.attention_end(begun), torch.full((3, 2, 4), 2.0))
        assert all(tensor() is None for tensor in read)


def test_compiled_code_gives_memory_of_attention_aside_to_nobody(monkeypatch):
    """Inductor hands copies of Q and K to the beginning alone, and would take their memory over from there on."""
    patches = {}
    monkeypatch.setattr(
        torch._dynamo, "lookup_backend", lambda _: lambda module, _, config_patches: patches.update(config_patches)
    )
    compiling.CompiledLayers(options={"triton.enable_pdl": True})._compile(False, layer(), [])
    assert patches["allow_buffer_reuse"] is False
    assert patches["inplace_buffers"] is False


@pytest.mark.parametrize("why", ["fed_by_mixer", "feeds_mixer", "writes", "adds", "twice"])
def test_attention_stays_where_order_matters(why):
    module = layer(**{why: True})
    before = names(module)
    assert overlap_attention(module) == 0
    assert names(module) == before


def test_a_parallel_hybrid_overlaps_and_says_the_same(monkeypatch):
    torch._dynamo.reset()
    found = []
    monkeypatch.setattr(compiling, "overlap_attention", lambda module: found.append(overlap_attention(module)))
    monkeypatch.setattr(opening, "CompiledLayers", lambda **_: compiling.CompiledLayers("eager"))
    tokens = []
    for compiled in (False, True):
        model = tiny_model("falcon_h1")
        ready = make_ready(model, packed_steps=True, compile_layers=compiled)
        engine = TransformersEngine(model, None, ready, poison_freed=True)
        tokens.append([done.token_ids for done in engine.generate([[5, 6, 7, 8, 9], [1, 2, 3]], GREEDY)])
        engine.close()
    assert tokens[0] == tokens[1]
    assert found
    assert set(found) == {1}
