"""mamba-ssm's chunked scan between gathered and scattered states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..batch import StateBatch
from ..checks import check_mamba2
from ..interface import NO_LIMIT
from ..triton.mixers import TritonMixers
from .longer import Longer, beside_decodes

CHUNK = 256
"""Tokens that the scan takes at once, the library's own default."""


@dataclass(frozen=True, slots=True)
class Call:
    """Requests that one call of the scan serves."""

    requests: slice
    tokens: slice
    continues: bool
    """One request that starts from a state; else all start from zeros."""
    sequence: torch.Tensor
    """(1, n) int32: whose each token is."""
    starts: torch.Tensor
    """(requests + 1,) int32: where each begins among these tokens."""


class MambaSsmMixers(TritonMixers):
    """mamba2 of several tokens goes to the library, which can start a packed batch from one state only.

    So requests that continue go one by one, and which do the host must know: each step waits for the device once.
    """

    name = "mamba-ssm"
    captures_ragged = False  # it is told on the host where each request begins

    def __init__(self, scan: Callable[..., Any]) -> None:
        self._scan = scan

    def mamba2(
        self,
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        state: torch.Tensor,
        batch: StateBatch,
        *,
        D: torch.Tensor | None = None,
        dt_bias: torch.Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = NO_LIMIT,
        decode_dt_limit: tuple[float, float] | None = None,
        z: torch.Tensor | None = None,
        chunk_size: int = 64,
    ) -> torch.Tensor:
        """Chunks of 256 tokens."""
        one_step = partial(
            super().mamba2, x, dt, A, B, C, state, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit,
            decode_dt_limit=decode_dt_limit, z=z,
        )  # fmt: skip
        if batch.max_query_len <= 1:
            return one_step(batch)
        check_mamba2(x, dt, A, B, C, state, batch, D, dt_bias, z)

        def longer(part: Longer) -> torch.Tensor:
            states = part.read(state, torch.float32)
            values, steps, keys, queries = (part.take(side) for side in (x, dt, B, C))
            gates = None if z is None else part.take(z)
            outputs = torch.empty(values.shape[1:], dtype=x.dtype, device=x.device)
            for call in batch.tables.get("calls of mamba-ssm", lambda: tuple(_calls(part))):
                at = call.tokens
                start = (
                    {"initial_states": states[call.requests], "return_final_states": True}
                    if call.continues
                    else {"seq_idx": call.sequence, "cu_seqlens": call.starts, "return_varlen_states": True}
                )
                outputs[at], states[call.requests] = self._scan(
                    values[:, at], steps[:, at], A, keys[:, at], queries[:, at], CHUNK, D=D,
                    z=None if gates is None else gates[:, at], dt_bias=dt_bias, dt_softplus=dt_softplus,
                    dt_limit=dt_limit, **start,
                )  # fmt: skip
            part.write(state, states)
            return outputs

        return beside_decodes(batch, longer, one_step)


def _calls(part: Longer) -> Iterator[Call]:
    """Runs of fresh requests, and each that continues a state; those without a page count as fresh."""
    continues = (~part.fresh & (part.slots >= 0)).tolist()
    starts, device = part.starts_host.tolist(), part.starts.device
    first = 0
    while first < len(continues):
        end = first + 1
        while not continues[first] and end < len(continues) and not continues[end]:
            end += 1
        requests, tokens = slice(first, end), slice(starts[first], starts[end])
        lens = torch.tensor(part.lens[requests])
        yield Call(
            requests=requests,
            tokens=tokens,
            continues=continues[first],
            sequence=torch.repeat_interleave(lens).to(device, torch.int32).unsqueeze(0),
            starts=torch.nn.functional.pad(lens.cumsum(0), (1, 0)).to(device, torch.int32),
        )
        first = end
