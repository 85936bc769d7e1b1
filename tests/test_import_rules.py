"""Planner files import neither torch nor transformers, and nothing happens at import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import makeready

ROOT = Path(makeready.__file__).resolve().parent
NEEDS_TORCH = {"platforms.ready"}
"""Planner folders' files that hold tensors."""

BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "safetensors", "numpy", "triton"):
            raise ImportError(f"{name} must not be imported here")

sys.meta_path.insert(0, Blocker())
import importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def planner_modules() -> list[str]:
    files = [
        *(ROOT / name for name in ("config.py", "device.py", "errors.py", "cli.py")),
        *(ROOT / "cache" / f"{name}.py" for name in ("specs", "block_size", "capacity", "layout", "grouping")),
        *(ROOT / "attention_backends" / f"{name}.py" for name in ("interface", "selection")),
        *(file for folder in ("hybrid", "platforms", "plugins") for file in sorted((ROOT / folder).glob("*.py"))),
    ]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files if file.exists()]
    return [f"makeready.{name.removesuffix('.__init__')}" for name in names if name not in NEEDS_TORCH]


def imports(*modules: str) -> subprocess.CompletedProcess:
    """Import the modules in a new interpreter that finds makeready as this one does and refuses torch."""
    found = ROOT.parent if ROOT.name == "makeready" else None
    start = f"import sys; sys.path.insert(0, {str(found)!r})\n" if found else ""
    return subprocess.run(
        [sys.executable, "-c", start + BLOCKED, *modules], capture_output=True, text=True, check=False
    )


def test_import_makeready_needs_no_torch():
    done = imports("makeready")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("batch", ["config", "cache", "attention_backends", "hybrid", "platforms", "plugins", "cli"])
def test_planner_files_need_no_torch(batch):
    modules = [name for name in planner_modules() if name.split(".")[1].startswith(batch) or name == batch]
    done = imports(*modules)
    assert done.returncode == 0, done.stderr


def test_the_check_itself_would_notice():
    done = imports("makeready.attention_backends.metadata")
    assert done.returncode != 0
    assert "torch must not be imported here" in done.stderr
