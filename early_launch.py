"""Programmatic launch of Triton kernels: a kernel is set up while the one before it in the stream still ends.

Such a kernel calls ``gdc_wait`` before it touches anything that kernels before it write, and always calls it, so that
whoever waits for it has waited for those before, too (CUDA C++ Programming Guide, programmatic dependent launch).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch


@cache
def early_launch(device: torch.device) -> dict[str, Any]:
    """Arguments of a launch on ``device``: ``EARLY`` for the kernel, and the option of Triton's launcher.

    NVIDIA devices have it from compute capability 9.0 on.
    """
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) < (9, 0):
        return {"EARLY": False}
    return {"EARLY": True, "launch_pdl": True}
