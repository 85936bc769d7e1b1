"""Planning needs no torch and no transformers (how fast it starts: makeready bench cold-start)."""

from __future__ import annotations

import subprocess
import sys

import makeready

MODULES = (
    "cache.block_size", "cache.capacity", "cache.grouping", "cache.layout", "hybrid.model_specs", "hybrid.presets",
    "hybrid.page_alignment", "platforms.cpu", "platforms.cuda", "platforms.xpu", "platforms.interface",
    "platforms.planning",
)  # fmt: skip
SCRIPT = """
import sys, types
# The package without its face, which is what a host engine's adapter pays for planning.
package = types.ModuleType("makeready")
package.__path__ = [{root!r}]
sys.modules["makeready"] = package
import {modules}
from makeready.hybrid.model_specs import read_model
from makeready.platforms.planning import plan_model
read_model("Qwen/Qwen3-8B")
heavy = [name for name in ("torch", "transformers", "numpy", "rich", "click", "pluggy") if name in sys.modules]
print(*heavy)
"""


def fresh() -> list[str]:
    script = SCRIPT.format(root=makeready.__path__[0], modules=", ".join(f"makeready.{name}" for name in MODULES))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_planner_modules_import_nothing_heavy() -> None:
    assert fresh() == []
