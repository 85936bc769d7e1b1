"""Mamba 1 and 2 in plain torch: one step for decodes, chunks for longer requests, float32 throughout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from ..batch import StateBatch
from .pages import decodes, longer


@dataclass(frozen=True, slots=True)
class TimeSteps:
    """How raw time steps become the ones that the recurrence uses."""

    bias: torch.Tensor | None
    softplus: bool
    limit: tuple[float, float]
    decode_limit: tuple[float, float]

    def prefill(self, dt: torch.Tensor) -> torch.Tensor:
        """Time steps of a request's first tokens, or of several at once."""
        return self._raw(dt).clamp(*self.limit)

    def decode(self, dt: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
        """Time steps of single tokens; a fresh one is a prefill of one token."""
        raw = self._raw(dt)
        return torch.where(fresh.unsqueeze(-1), raw.clamp(*self.limit), raw.clamp(*self.decode_limit))

    def _raw(self, dt: torch.Tensor) -> torch.Tensor:
        dt = dt.float()
        if self.bias is not None:
            dt = dt + self.bias.float()
        return functional.softplus(dt) if self.softplus else dt


def mamba2(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor,
    batch: StateBatch,
    *,
    steps: TimeSteps,
    chunk_size: int,
) -> torch.Tensor:
    """(T, H, P) float32 outputs without skip and gate."""
    heads = x.shape[1]
    repeats = heads // B.shape[1]
    A = A.float()
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    rows = decodes(batch)
    if len(rows.tokens):
        step = steps.decode(dt[rows.tokens], rows.fresh)
        keys, queries = (side[rows.tokens].float().repeat_interleave(repeats, dim=1) for side in (B, C))
        added = (step[..., None] * x[rows.tokens].float())[..., None] * keys[:, :, None, :]
        states = rows.read(state) * (step * A).exp()[..., None, None] + added
        rows.write(state, states)
        out[rows.tokens] = (states @ queries[..., None])[..., 0]
    for rows in longer(batch):
        step = steps.prefill(dt[rows.tokens])
        states = rows.read(state)[0]
        keys, queries = (side[rows.tokens].float().repeat_interleave(repeats, dim=1) for side in (B, C))
        scaled = x[rows.tokens].float() * step[..., None]
        parts = []
        for start in range(0, len(rows.tokens), chunk_size):
            part = slice(start, start + chunk_size)
            y, states = _chunk(scaled[part], (step * A)[part], keys[part], queries[part], states)
            parts.append(y)
        out[rows.tokens] = torch.cat(parts)
        rows.write(state, states.unsqueeze(0))
    return out


def _chunk(
    x: torch.Tensor, decay: torch.Tensor, B: torch.Tensor, C: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One chunk: x (L, H, P) times dt, log decays (L, H), B and C (L, H, N), state (H, P, N) before it."""
    total = decay.cumsum(0).transpose(0, 1)  # (H, L)
    pairs = (total[:, :, None] - total[:, None, :]).tril()
    weights = (C.transpose(0, 1) @ B.permute(1, 2, 0)) * pairs.exp()
    values = x.transpose(0, 1)  # (H, L, P)
    y = weights.tril() @ values + (C.transpose(0, 1) * total.exp()[..., None]) @ state.transpose(1, 2)
    left = (total[:, -1:] - total).exp()[..., None]  # what remains of each token at the chunk's end
    state = state * total[:, -1].exp()[:, None, None] + values.transpose(1, 2) @ (B.transpose(0, 1) * left)
    return y.transpose(0, 1), state


def mamba1(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor,
    batch: StateBatch,
    *,
    steps: TimeSteps,
) -> torch.Tensor:
    """(T, I) float32 outputs without skip and gate; B and C are (T, G, N), ``state`` (num_slots, G, I / G, N)."""
    groups = B.shape[1]
    shape = (groups, x.shape[1] // groups)
    A = A.float().reshape(*shape, A.shape[-1])
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    rows = decodes(batch)
    if len(rows.tokens):
        step = steps.decode(dt[rows.tokens], rows.fresh).reshape(-1, *shape)
        states = rows.read(state)
        y, states = _advance(states, x[rows.tokens].reshape(-1, *shape), step, A, B[rows.tokens], C[rows.tokens])
        rows.write(state, states)
        out[rows.tokens] = y.flatten(1)
    for rows in longer(batch):
        states = rows.read(state)
        step = steps.prefill(dt[rows.tokens])
        for position, token in enumerate(rows.tokens.tolist()):
            one = slice(token, token + 1)
            time = step[position].reshape(1, *shape)
            y, states = _advance(states, x[one].reshape(1, *shape), time, A, B[one], C[one])
            out[token] = y.flatten()
        rows.write(state, states)
    return out


def _advance(
    states: torch.Tensor, x: torch.Tensor, step: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of R requests: states (R, G, J, N), x and step (R, G, J), A (G, J, N), B and C (R, G, N)."""
    added = (step * x.float())[..., None] * B.float()[:, :, None, :]
    states = states * (step[..., None] * A).exp() + added
    return (states @ C.float()[..., None])[..., 0], states


def skip_and_gate(
    y: torch.Tensor, x: torch.Tensor, D: torch.Tensor | None, z: torch.Tensor | None, batch: StateBatch
) -> torch.Tensor:
    """``(y + D x) * silu(z)`` in the inputs' dtype, zeros for tokens of requests without a page."""
    if D is not None:
        skip = D.float()
        y = y + x.float() * (skip[:, None] if skip.dim() == 1 and x.dim() == 3 else skip)
    if z is not None:
        y = y * functional.silu(z.float())
    lens = torch.tensor(batch.lens(), device=x.device)
    padding = (batch.slots < 0).repeat_interleave(lens)
    return y.masked_fill(padding.view(-1, *[1] * (y.dim() - 1)), 0.0).to(x.dtype)
