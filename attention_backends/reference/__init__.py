"""Attention the slow and obvious way, on any device: what every other backend is compared with."""

from .backend import ReferenceBackend

__all__ = ["ReferenceBackend"]
