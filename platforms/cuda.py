"""NVIDIA GPUs."""

from __future__ import annotations

from .interface import Platform


class CudaPlatform(Platform):
    """No limits of its own: a backend's capabilities say which compute capabilities its kernels take."""

    name = "cuda"
    device_type = "cuda"
