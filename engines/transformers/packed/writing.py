"""Which nodes of a traced graph change a tensor in place: around them it matters when something is read."""

from __future__ import annotations

import operator

from torch.fx import Node

_OPERATORS = frozenset({
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
    operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor, operator.imatmul,
})  # fmt: skip


def writes(node: Node) -> bool:
    """True if ``node`` writes into a tensor that was there before it."""
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    return node.target in _OPERATORS or bool(node.kwargs.get("inplace")) or node.kwargs.get("out") is not None


def is_changed(node: Node) -> bool:
    """True if something writes into what ``node`` makes."""
    return any(user.args and user.args[0] is node and writes(user) for user in node.users)
