"""The device that kernels are launched on: streams, graphs and Triton take the current one, whatever they are given."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def current(device: torch.device) -> AbstractContextManager[object]:
    """Make ``device`` the current one of its kind meanwhile; a CPU always is."""
    if device.type == "cpu":
        return nullcontext()
    manager: AbstractContextManager[object] = getattr(torch, device.type).device(device)
    return manager
