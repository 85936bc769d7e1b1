"""NVIDIA GPUs."""

from __future__ import annotations

from .interface import Platform

CUDA = Platform(name="cuda", device_type="cuda")
"""Every compute capability that a backend's own kernels take; backends refuse devices by themselves."""
