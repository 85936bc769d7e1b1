"""Flash attention by Triton kernels of our own: decode shared out evenly, prefill by tiles, any block size."""

from .provider import TritonProvider

__all__ = ["TritonProvider"]
