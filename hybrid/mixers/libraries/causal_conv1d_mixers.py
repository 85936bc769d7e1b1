"""causal-conv1d on packed requests that continue a state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ....errors import BackendError
from ..batch import StateBatch
from ..checks import check_conv
from ..triton.mixers import TritonMixers
from .longer import Longer, beside_decodes

WIDTHS = (2, 3, 4)
"""Widths of kernels that the library was compiled for."""
_CHANNELS = 8
"""It reads as many channels at once."""


@dataclass(frozen=True, slots=True)
class Places:
    """Rows of the input in which every request has the columns of its state before its tokens."""

    columns: torch.Tensor
    """(R x W,) int64: rows of the states' columns."""
    tokens: torch.Tensor
    """(T',) int64: rows of the tokens."""
    newest: torch.Tensor
    """(R x W,) int64: the last W rows of each request."""
    sequence: torch.Tensor
    """(1, T' + R x W) int32: whose each row is."""


class CausalConv1dMixers(TritonMixers):
    """Requests with several tokens go to the library, single tokens to Triton in place.

    Packed, it starts every request from zeros; the columns that its state keeps are therefore put before its tokens,
    and their outputs are thrown away.
    """

    name = "causal-conv1d"
    captures_ragged = False  # it is told on the host where each request begins

    def __init__(self, convolve: Callable[..., Any]) -> None:
        self._convolve = convolve

    def causal_conv(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        state: torch.Tensor,
        batch: StateBatch,
        *,
        activation: str | None = None,
    ) -> torch.Tensor:
        """Kernels of 2 to 4 columns, a multiple of 8 channels."""
        one_step = partial(super().causal_conv, x, weight, bias, state, activation=activation)
        if batch.max_query_len <= 1:
            return one_step(batch)
        check_conv(x, weight, bias, state, batch, activation)
        _check(weight)
        columns = state.shape[-1]

        def longer(part: Longer) -> torch.Tensor:
            at = batch.tables.get(("rows of causal-conv1d", columns), lambda: _places(part, columns))
            rows = torch.empty(at.sequence.shape[1], x.shape[1], dtype=x.dtype, device=x.device)
            rows[at.columns] = part.read(state, x.dtype).transpose(1, 2).flatten(0, 1)
            rows[at.tokens] = part.take(x)[0]
            part.write(state, rows[at.newest].view(-1, columns, x.shape[1]).transpose(1, 2))
            y = self._convolve(
                rows.transpose(0, 1).unsqueeze(0), weight, bias, seq_idx=at.sequence, activation=activation
            )
            outputs: torch.Tensor = y[0].transpose(0, 1)[at.tokens]
            return outputs

        return beside_decodes(batch, longer, one_step)


def _check(weight: torch.Tensor) -> None:
    """Refuse what the library was not compiled for.

    :raises BackendError: naming it.
    """
    channels, width = weight.shape
    if width in WIDTHS and channels % _CHANNELS == 0:
        return
    raise BackendError(
        f"causal-conv1d has kernels of {', '.join(map(str, WIDTHS))} columns over a multiple of {_CHANNELS} channels, "
        f"and the layer's has {width} over {channels}",
        option="weight",
        value=(channels, width),
        expected=WIDTHS,
    )


def _places(part: Longer, columns: int) -> Places:
    device, lens = part.slots.device, torch.tensor(part.lens)
    ends = (lens + columns).cumsum(0)
    before = (ends - lens - columns)[:, None] + torch.arange(columns)
    newest = (ends - columns)[:, None] + torch.arange(columns)
    owner = torch.repeat_interleave(lens)
    tokens = torch.arange(int(lens.sum())) + (owner + 1) * columns
    moved = (before.flatten(), tokens, newest.flatten())
    first, second, third = (rows.to(device, non_blocking=True) for rows in moved)
    sequence = torch.repeat_interleave(lens + columns).to(device, torch.int32).unsqueeze(0)
    return Places(columns=first, tokens=second, newest=third, sequence=sequence)
