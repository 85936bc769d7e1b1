"""A pass over what is compiled: linear layers that read the same tensor become one operator."""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .linears import MAX_WEIGHTS
from .ops import operators

_LINEAR = (torch.nn.functional.linear, torch._C._nn.linear)


def merge_linears(module: GraphModule, *, alone: bool) -> int:
    """Rewrite ``module`` in place; how many operators there are now.

    :param alone: also those whose input no other reads: worth it for one token.
    """
    graph = module.graph
    _drop_factors_of_one(graph)
    by_input: dict[Node, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _LINEAR and _is_plain(node):
            by_input[node.args[0]].append(node)
    made = 0
    for source, nodes in by_input.items():
        for start in range(0, len(nodes), MAX_WEIGHTS):
            some = nodes[start : start + MAX_WEIGHTS]
            if len(some) > 1 or alone:
                _merge(graph, source, some)
                made += 1
    if made:
        graph.lint()
        module.recompile()
    return made


def _merge(graph: torch.fx.Graph, source: Node, nodes: list[Node]) -> None:
    with graph.inserting_before(nodes[0]):
        joint = graph.call_function(operators().linears.default, (source, [node.args[1] for node in nodes]))
        parts = [graph.call_function(operator.getitem, (joint, index)) for index in range(len(nodes))]
    values = [node.meta.get("example_value") for node in nodes]
    joint.meta["example_value"] = values
    for node, part, value in zip(nodes, parts, values, strict=True):
        part.meta["example_value"] = value
        node.replace_all_uses_with(part)
        graph.erase_node(node)


def _is_plain(node: Node) -> bool:
    """x and a matrix that is an input of the graph (so that it is there from the start), and no bias."""
    if node.kwargs or len(node.args) < 2 or not all(isinstance(arg, Node) for arg in node.args[:2]):
        return False
    bias: Any = node.args[2] if len(node.args) > 2 else None
    weight = node.args[1]
    return bias is None and isinstance(weight, Node) and weight.op in ("placeholder", "get_attr")


def _drop_factors_of_one(graph: torch.fx.Graph) -> None:
    """``x * 1.0`` is ``x``: what models with multipliers that are not used have between a norm and its readers."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is operator.mul and node.kwargs == {}:
            value, factor = node.args
            if isinstance(value, Node) and isinstance(factor, float) and factor == 1.0 and _is_floating(value):
                node.replace_all_uses_with(value)
                graph.erase_node(node)


def _is_floating(node: Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.is_floating_point()
