"""The requests of a step that a library takes: those with several tokens, and their states outside of pages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from ..batch import StateBatch
from ..triton.kernels.pages import clear_padding, gather_pages, scatter_pages

_ELEMENTS = 4096
"""Elements of a state that a program copies."""
_COLUMNS = 1024
"""Columns of a token that a program clears."""


@dataclass(frozen=True, slots=True)
class Longer:
    """R requests with several tokens each, packed one after the other without the step's decodes."""

    tokens: slice | torch.Tensor
    """Which of the step's T tokens are theirs."""
    starts: torch.Tensor
    """(R + 1,) int64: where each begins among these tokens."""
    starts_host: torch.Tensor
    """The same on the host."""
    lens: tuple[int, ...]
    slots: torch.Tensor
    """(R,) int32."""
    fresh: torch.Tensor
    """(R,) bool."""
    everything: bool
    """Whether these are all tokens of the step."""

    def take(self, tokens: torch.Tensor) -> torch.Tensor:
        """(1, T', ...): these of the step's tokens, as a batch of one; a copy only where decodes are between."""
        return tokens[self.tokens].unsqueeze(0)

    def read(self, state: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """(R, ...) states out of their pages, zeros for fresh requests and for those that only fill the step."""
        states = torch.empty(len(self.lens), *state.shape[1:], dtype=dtype, device=state.device)
        sizes, strides, blocks = _page(state)
        gather_pages[(blocks, len(self.lens))](
            state, self.slots, self.fresh, states, *strides, *sizes, BLOCK=_ELEMENTS, num_warps=4
        )
        return states

    def write(self, state: torch.Tensor, states: torch.Tensor) -> None:
        """(R, ...) new states into their pages."""
        sizes, strides, blocks = _page(state)
        scatter_pages[(blocks, len(self.lens))](
            states.contiguous(), self.slots, state, *strides, *sizes, BLOCK=_ELEMENTS, num_warps=4
        )

    def clear_padding(self, out: torch.Tensor) -> None:
        """Zeros for the outputs (T', ...) of requests without a page."""
        width = out[0].numel()
        clear_padding[(-(-width // _COLUMNS), len(self.lens))](
            out, self.slots, self.starts, width, BLOCK=_COLUMNS, num_warps=4
        )


def longer_requests(batch: StateBatch) -> Longer:
    """The requests with several tokens; waits for the device only if the host does not know their lengths."""
    return batch.tables.get("longer requests", lambda: _longer(batch))


def beside_decodes(
    batch: StateBatch, longer: Callable[[Longer], torch.Tensor], decodes: Callable[[StateBatch], torch.Tensor]
) -> torch.Tensor:
    """A step's outputs: ``longer`` gives those of the longer requests, ``decodes`` those of single tokens.

    :param longer: (T', ...) contiguous, padding included.
    :param decodes: (T, ...) with rows of single tokens; what it leaves in the others does not matter.
    """
    part = longer_requests(batch)
    if not part.lens:
        return decodes(batch)
    with torch.no_grad():
        outputs = longer(part).contiguous()
    part.clear_padding(outputs)
    if part.everything:
        return outputs
    out = decodes(batch.tables.get("only decodes", lambda: replace(batch, max_query_len=1)))
    out[part.tokens] = outputs
    return out


def _longer(batch: StateBatch) -> Longer:
    lens, device = batch.lens(), batch.slots.device
    chosen = [request for request, length in enumerate(lens) if length > 1]
    starts = list(accumulate(lens, initial=0))
    host = torch.tensor(list(accumulate((lens[request] for request in chosen), initial=0)), dtype=torch.int64)
    one_run = not chosen or chosen[-1] - chosen[0] == len(chosen) - 1
    tokens: slice | torch.Tensor
    if one_run:
        tokens = slice(starts[chosen[0]], starts[chosen[-1] + 1]) if chosen else slice(0, 0)
    else:
        places = [torch.arange(starts[request], starts[request + 1]) for request in chosen]
        tokens = torch.cat(places).to(device, non_blocking=True)
    where = torch.tensor(chosen, dtype=torch.int64).to(device, non_blocking=True)
    return Longer(
        tokens=tokens,
        starts=host.to(device, non_blocking=True),
        starts_host=host,
        lens=tuple(lens[request] for request in chosen),
        slots=batch.slots[where],
        fresh=batch.fresh[where],
        everything=one_run and sum(lens) == int(host[-1]),
    )


def _page(state: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Sizes and strides of a page as three axes (slots' stride first), and the programs that copy it."""
    missing = 4 - state.dim()
    sizes = (*(1,) * missing, *state.shape[1:])
    strides = (state.stride(0), *(0,) * missing, *state.stride()[1:])
    return sizes, strides, -(-state[0].numel() // _ELEMENTS)
