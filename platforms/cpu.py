"""Any CPU that torch runs on."""

from __future__ import annotations

from .interface import Platform

CPU = Platform(name="cpu", device_type="cpu", default_block_size=128)
"""Larger blocks than on accelerators: CPU kernels walk blocks one after the other and like them long."""
