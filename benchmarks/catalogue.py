"""Which benchmarks there are: every module of this folder with a ``main``. Read, not imported: some need torch."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One module of this folder."""

    name: str
    """What the user writes after ``makeready bench``: the module's name with dashes."""
    summary: str
    """The first line of its docstring."""

    def load(self) -> Callable[[Sequence[str] | None], int]:
        """Its ``main``, which takes the command line and returns the exit code."""
        main: Callable[[Sequence[str] | None], int] = import_module(f"{__package__}.{self.name.replace('-', '_')}").main
        return main


@cache
def benchmarks() -> dict[str, Benchmark]:
    """By name, in alphabetical order."""
    found = {}
    for file in sorted(Path(__file__).parent.glob("*.py")):
        tree = ast.parse(file.read_text())
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            name = file.stem.replace("_", "-")
            found[name] = Benchmark(name, (ast.get_docstring(tree) or "").partition("\n")[0])
    return found
