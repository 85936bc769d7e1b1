"""Settings of every test: one thread, no downloads, CUDA tests only where there is a CUDA device."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Small shapes on shared cores run fastest with one thread; torch is not needed for every test."""
    if find_spec("torch") is not None:
        import torch

        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``cuda`` say why they do not run here."""
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if marked and not _cuda_is_here():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _cuda_is_here() -> bool:
    if find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()
