"""Columns of convolution states: engines keep as many as the kernel is wide, or one less; libraries want either."""

from __future__ import annotations

import torch
from torch.nn import functional

from ....errors import BackendError


def padded_columns(states: torch.Tensor, columns: int, library: str) -> torch.Tensor:
    """(R, C, columns) states of which (R, C, columns) or the newest (R, C, columns - 1) are known.

    :raises BackendError: for pages with more columns.
    """
    known = states.shape[-1]
    if known not in (columns - 1, columns):
        raise BackendError(
            f"{library} reads convolution states of {columns - 1} or {columns} columns, and the pages have {known}",
            option="state",
            value=known,
            expected=(columns - 1, columns),
        )
    return functional.pad(states, (columns - known, 0))
