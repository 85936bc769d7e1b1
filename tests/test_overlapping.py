"""Attention that a layer's state mixers do not need begins before them and ends where it was."""

from __future__ import annotations

import pytest
import torch
from torch.fx import Graph, GraphModule

from engine_setup import make_ready
from makeready.engines.transformers.engine import SamplingParams, TransformersEngine
from makeready.engines.transformers.packed import compiling, opening
from makeready.engines.transformers.packed.ops import operators
from makeready.engines.transformers.packed.overlapping import overlap_attention
from tiny_models import tiny_model

GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)
CALL = (None, 1.0, True, None, None)


def layer(*, fed_by_mixer: bool = False, feeds_mixer: bool = False, writes: bool = False) -> GraphModule:
    """A parallel hybrid's layer: a convolution, then attention over what rotary makes of x, then their sum."""
    ops, graph = operators(), Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    if feeds_mixer:
        early = graph.call_function(ops.attention.default, (x, x, x, *CALL))
    mixed = graph.call_function(ops.causal_conv.default, (early if feeds_mixer else x, weight, None, None))
    if writes:
        graph.call_method("mul_", (x, 2.0))
    turned = graph.call_function(torch.cos, (mixed if fed_by_mixer else x,))
    attended = early if feeds_mixer else graph.call_function(ops.attention.default, (turned, x, x, *CALL))
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
    assert ended.args == (begun, *begun.args[:3]), "its inputs must live until it ends"


@pytest.mark.parametrize("why", ["fed_by_mixer", "feeds_mixer", "writes"])
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
