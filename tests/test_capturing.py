"""Graphs are recorded whatever else the process frees or runs meanwhile."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from makeready.engines.transformers.packed.capturing import capture, nothing_collected


def test_collection_goes_on_afterwards_even_if_something_raises():
    def failing():
        with nothing_collected():
            assert not gc.isenabled()
            raise ValueError("of mine")

    assert gc.isenabled()
    with pytest.raises(ValueError, match="of mine"):
        failing()
    assert gc.isenabled()


def test_collection_that_was_off_stays_off():
    gc.disable()
    try:
        with nothing_collected():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()


class Ring:
    """Garbage that only a collection finds, with a graph and its memory inside."""

    def __init__(self):
        self.itself = self
        x = torch.zeros(1 << 20, device="cuda")
        self.captured = capture(lambda: (x + 1, x + 2), torch.cuda.graph_pool_handle())


@pytest.mark.cuda
def test_garbage_does_not_spoil_a_capture():
    x = torch.ones(8, device="cuda")
    pool = torch.cuda.graph_pool_handle()
    made = 0

    def run():
        nonlocal made
        for _ in range(50):  # enough objects for the collector to have come, were it on
            made += len([[object() for _ in range(100)] for _ in range(20)])
        return x * 2, x * 3

    for _ in range(5):
        Ring()
        with nothing_collected():
            captured = capture(run, pool)
        captured.graph.replay()
        assert captured.tokens.tolist() == [3.0] * 8
    assert made


@pytest.mark.cuda
def test_another_thread_may_use_the_device_during_a_capture():
    x, ready, done = torch.ones(8, device="cuda"), threading.Event(), threading.Event()

    def other():
        ready.wait()
        assert torch.zeros(1 << 22, device="cuda").sum().item() == 0
        done.set()

    thread = threading.Thread(target=other)
    thread.start()

    def run():
        if torch.cuda.is_current_stream_capturing():
            ready.set()
            assert done.wait(30)
        return x * 2, x * 3

    captured = capture(run, torch.cuda.graph_pool_handle())
    thread.join()
    captured.graph.replay()
    assert captured.logits.tolist() == [2.0] * 8
