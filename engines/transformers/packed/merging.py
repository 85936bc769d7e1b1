"""A pass over what is compiled: linear layers that read the same tensor become one operator."""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .linears import MAX_WEIGHTS
from .ops import operators
from .writing import is_changed

_LINEAR = (torch.nn.functional.linear, torch._C._nn.linear)


def merge_linears(module: GraphModule, *, alone: bool) -> int:
    """Rewrite ``module`` in place; how many operators there are now.

    :param alone: also those whose input no other reads: worth it for one token.
    """
    graph = module.graph
    _drop_factors_of_one(graph)
    made = _fuse_residuals(graph) if alone else 0
    by_input: dict[Any, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        if _is_linear(node):
            by_input[node.args[0]].append(node)
    for nodes in by_input.values():
        for start in range(0, len(nodes), MAX_WEIGHTS):
            some = nodes[start : start + MAX_WEIGHTS]
            if len(some) > 1 or alone:
                _merge(graph, some)
                made += 1
    if made:
        graph.lint()
        module.recompile()
    return made


def _fuse_residuals(graph: torch.fx.Graph) -> int:
    """Residuals, which one token's kernels add along; how many were found."""
    made = 0
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is operator.add and (added := _added_linear(node)):
            made += _replace(graph, [node, *node.args], operators().linear_add.default, added)
    return made


def _added_linear(total: Node) -> tuple[Any, Any, Any] | None:
    """x, matrix and residual, if ``total`` adds a tensor of its own shape to a linear layer nobody else reads."""
    arguments: Any = total.args
    product: Any
    for product, residual in (arguments, arguments[::-1]):
        if not (isinstance(product, Node) and isinstance(residual, Node) and _is_linear(product)):
            continue
        values: list[Any] = [node.meta.get("example_value") for node in (total, residual, product)]
        tensors = all(isinstance(value, torch.Tensor) for value in values)
        if tensors and len(product.users) == 1 and len({(v.shape, v.dtype) for v in values}) == 1:
            return product.args[0], product.args[1], residual
    return None


def _replace(graph: torch.fx.Graph, nodes: list[Any], target: Any, arguments: tuple[Node, ...]) -> int:
    """One operator for the first of ``nodes``; a linear layer that only it has read goes with it."""
    with graph.inserting_before(nodes[0]):
        fused = graph.call_function(target, arguments)
    fused.meta["example_value"] = nodes[0].meta.get("example_value")
    nodes[0].replace_all_uses_with(fused)
    graph.erase_node(nodes[0])
    for node in nodes[1:]:
        if _is_linear(node) and not node.users:
            graph.erase_node(node)
    return 1


def _is_linear(node: Any) -> bool:
    return bool(node.op == "call_function" and node.target in _LINEAR and _is_plain(node))


def _merge(graph: torch.fx.Graph, nodes: list[Any]) -> None:
    source = nodes[0].args[0]  # read now: it may be what an earlier merge has made
    with graph.inserting_before(nodes[0]):
        joint = graph.call_function(operators().linears.default, (source, [node.args[1] for node in nodes]))
        parts = [graph.call_function(operator.getitem, (joint, index)) for index in range(len(nodes))]
    values = [node.meta.get("example_value") for node in nodes]
    joint.meta["example_value"] = values
    for node, part, value in zip(nodes, parts, values, strict=True):
        part.meta["example_value"] = value
        node.replace_all_uses_with(part)
        graph.erase_node(node)


def _is_plain(node: Any) -> bool:
    """x and a matrix that is an input of the graph (so that it is there from the start), and no bias."""
    if node.kwargs or len(node.args) < 2 or not all(isinstance(arg, Node) for arg in node.args[:2]):
        return False
    if any(map(is_changed, node.args[:2])):
        return False
    bias: Any = node.args[2] if len(node.args) > 2 else None
    weight = node.args[1]
    return bias is None and isinstance(weight, Node) and weight.op in ("placeholder", "get_attr")


def _drop_factors_of_one(graph: torch.fx.Graph) -> None:
    """``x * 1.0`` is ``x``: what models with multipliers that are not used have between a norm and its readers."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is operator.mul and node.kwargs == {}:
            value, factor = node.args
            if not isinstance(value, Node) or is_changed(value) or is_changed(node):
                continue
            if isinstance(factor, float) and factor == 1.0 and _is_floating(value):
                node.replace_all_uses_with(value)
                graph.erase_node(node)


def _is_floating(node: Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.is_floating_point()
