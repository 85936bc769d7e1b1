"""What the environment says about how kernels run. No torch and no triton here: ``plan`` reads it."""

from __future__ import annotations

import os


def interpreted() -> bool:
    """Whether the environment asks Triton to interpret kernels on the host."""
    return os.environ.get("TRITON_INTERPRET") == "1"
