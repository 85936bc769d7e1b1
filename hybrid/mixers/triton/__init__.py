"""Triton kernels that read and write state pages in place: CUDA, and any device whose Triton has a backend."""

from .backend import TritonMixerBackend

__all__ = ["TritonMixerBackend"]
