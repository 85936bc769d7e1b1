"""Torch's flex_attention over the paged cache, compiled."""

from .backend import FlexBackend

__all__ = ["FlexBackend"]
