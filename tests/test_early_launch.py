"""A kernel that is set up early waits, every time, before it touches memory: read off the source of every kernel."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import makeready

ROOT = Path(makeready.__file__).parent
FOLDERS = ("attention_backends", "cache", "engines", "hybrid")


def kernels() -> dict[str, ast.FunctionDef]:
    """Kernels with ``EARLY`` among their parameters."""
    found = {}
    for path in (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))):
        text = path.read_text(encoding="utf-8")
        if "EARLY" in text:
            for node in ast.parse(text).body:
                if isinstance(node, ast.FunctionDef) and "EARLY" in [argument.arg for argument in node.args.args]:
                    found[node.name] = node
    return found


def called(node: ast.AST) -> list[str]:
    return [part.func.attr for part in ast.walk(node) if isinstance(part, ast.Call) and hasattr(part.func, "attr")]


@pytest.mark.parametrize("name", kernels())
def test_the_wait_comes_before_memory_and_cannot_be_passed(name):
    for statement in kernels()[name].body:
        if "gdc_wait" in called(statement):
            assert isinstance(statement, ast.If)
            assert ast.unparse(statement.test) == "EARLY"
            assert "gdc_wait" in called(ast.Module(statement.body, [])), "not in the branch without it"
            return
        touched = {call for call in called(statement) if call in ("load", "store") or call.startswith("atomic")}
        assert not touched, f"{name} touches memory before it waits"
        assert not any(isinstance(part, ast.Return) for part in ast.walk(statement)), (
            f"{name} may leave without waiting"
        )
    raise AssertionError(f"{name} never waits")


def test_kernels_are_found():
    assert {"decode_kernel", "write_kernel", "conv_step", "one_token_kernel"} <= set(kernels())
