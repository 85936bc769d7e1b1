"""Any CPU that torch runs on."""

from __future__ import annotations

from .interface import Platform

# Flash on a CPU is Intel's extension, which loads in torch 2.8 alone. Blocks are larger than on accelerators: CPU
# kernels walk them one after the other and like them long.
CPU = Platform(
    name="cpu",
    device_type="cpu",
    default_block_size=128,
    seldom_installed=("flash",),
    covers_skipped_layers=False,
)
