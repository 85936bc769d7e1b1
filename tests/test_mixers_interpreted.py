"""The Triton mixers' tests, run in Triton's interpreter where there is no CUDA device."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_kernels_in_the_interpreter():
    """A process of its own: Triton decides whether it interprets when it is imported."""
    tests = Path(__file__).parent
    names = ("triton", "published_bugs", "batch_invariance", "libraries")
    files = [tests / f"test_mixers_{name}.py" for name in names]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "not plain and not TestChoice",
        *map(str, files),
    ]
    done = subprocess.run(command, cwd=tests.parent, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]
