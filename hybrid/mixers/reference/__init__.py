"""Plain torch: every mixer on every device, the oracle of the kernels."""

from .backend import ReferenceMixerBackend

__all__ = ["ReferenceMixerBackend"]
