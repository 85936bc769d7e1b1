"""One thread per test run: the machines that run the tests are shared."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
