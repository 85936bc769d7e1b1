import pytest

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tests share a small machine: one thread each."""
    torch.set_num_threads(1)
