"""Small host lists become device tensors without making the host wait for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_PINNED = ("cuda", "xpu")


def stage(
    values: Sequence[int] | Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """``values`` as a tensor on ``device``, copied in stream order.

    A plain ``torch.tensor(values, device=...)`` waits for everything queued on the device. From pinned memory
    the copy is queued as well, and the allocator of pinned memory keeps the source until it is done.
    """
    if device.type in _PINNED:
        return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)
    return torch.tensor(values, dtype=dtype, device=device)
