"""Flash attention: a policy per platform, and providers that bring the kernels."""

from .backend import FlashBackend
from .providers import FlashProvider

__all__ = ["FlashBackend", "FlashProvider"]
