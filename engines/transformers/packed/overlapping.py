"""A pass over what is compiled: attention runs beside state mixers that do not need it, in parallel hybrids."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, GraphModule, Node

from .ops import operators
from .writing import writes

_MIXERS = ("causal_conv", "mamba1", "mamba2", "gated_delta", "kda")


def overlap_attention(module: GraphModule) -> int:
    """Rewrite ``module`` in place; how many calls of attention begin early now and end where they were.

    Attention moves, with what it is computed from, before the first mixer that neither needs nor feeds it. A graph
    that writes into tensors stays as it is: there it matters when something is read. So does one with several calls
    of attention: one at a time runs aside.
    """
    graph, ops = module.graph, operators()
    calls = [node for node in graph.nodes if node.target in _forms(ops.attention)]
    if len(calls) != 1 or any(writes(node) for node in graph.nodes):
        return 0
    mixers = {form for name in _MIXERS for form in _forms(getattr(ops, name))}
    made = 0
    for node in calls:
        before, after = _all(node, "all_input_nodes"), _all(node, "users")
        beside = [other for other in graph.nodes if other.target in mixers and other not in before | after]
        if beside:
            _begin_before(graph, node, before, beside[0])
            made += 1
    if made:
        graph.lint()
        module.recompile()
    return made


def _begin_before(graph: Graph, node: Node, needed: set[Node], mixer: Node) -> None:
    ops, order = operators(), list(graph.nodes)
    first_user = min(node.users, key=order.index)
    place = order.index(mixer)
    for other in order[place:]:
        if other in needed:
            mixer.prepend(other)
    with graph.inserting_before(mixer if order.index(node) > place else node):
        begun = graph.call_function(ops.attention_begin.default, node.args, node.kwargs)
    with graph.inserting_before(first_user):
        ended = graph.call_function(ops.attention_end.default, (begun,))
    ended.meta["example_value"] = node.meta.get("example_value")
    node.replace_all_uses_with(ended)
    graph.erase_node(node)


def _forms(operation: Any) -> tuple[Any, Any]:
    """An operator as Dynamo may name it."""
    return operation, operation.default


def _all(node: Node, side: str) -> set[Node]:
    """Everything that ``node`` is made from, or everything made from it."""
    found: set[Node] = set()
    todo: list[Any] = [node]
    while todo:
        for other in getattr(todo.pop(), side):
            if other not in found:
                found.add(other)
                todo.append(other)
    return found
