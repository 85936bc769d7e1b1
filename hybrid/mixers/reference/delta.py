"""Delta rules in plain torch. The gated one is KDA with the same decay in every channel, and computed so.

A chunk solves one triangular system instead of stepping through its tokens: with G the summed log decay, the values
that tokens really write are ``u = (I + tril(beta k k' exp(G - G'), -1))^-1 beta (v - k exp(G) S)``.
"""

from __future__ import annotations

import torch

from ..batch import StateBatch
from .pages import decodes, longer

CHUNK = 16
"""Tokens taken at once; decays of a channel are compared pair by pair, so that none overflows."""


def delta(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    batch: StateBatch,
) -> torch.Tensor:
    """(T, H, Dv) float32: q and k (T, H, Dk) float32, normalised and scaled; g (T, H, Dk) or (T, H, 1)."""
    out = torch.zeros(v.shape, dtype=torch.float32, device=v.device)
    rows = decodes(batch)
    if len(rows.tokens):
        at = rows.tokens
        states = rows.read(state) * g[at].exp()[..., None]
        known = (states * k[at][..., None]).sum(-2)
        written = (v[at].float() - known) * beta[at].float()[..., None]
        states = states + k[at][..., None] * written[..., None, :]
        rows.write(state, states)
        out[at] = (states * q[at][..., None]).sum(-2)
    for rows in longer(batch):
        states = rows.read(state)[0]
        parts = []
        for start in range(0, len(rows.tokens), CHUNK):
            at = rows.tokens[start : start + CHUNK]
            one_q, one_k, one_v, one_g, one_beta = (side[at].float().transpose(0, 1) for side in (q, k, v, g, beta))
            y, states = _chunk(one_q, one_k, one_v, one_g, one_beta, states)
            parts.append(y.transpose(0, 1))
        out[rows.tokens] = torch.cat(parts)
        rows.write(state, states.unsqueeze(0))
    return out


def _chunk(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One chunk: q, k (H, L, Dk), v (H, L, Dv), g (H, L, Dk | 1), beta (H, L), state (H, Dk, Dv) before it."""
    total = g.cumsum(1)
    length = k.shape[1]
    later = torch.ones(length, length, dtype=torch.bool, device=k.device).triu(1)
    pairs = (total[:, :, None] - total[:, None, :]).masked_fill(later[..., None], -torch.inf).exp()  # (H, L, L, Dk|1)
    alike = (k[:, :, None] * k[:, None, :] * pairs).sum(-1)
    seen = (q[:, :, None] * k[:, None, :] * pairs).sum(-1)
    system = alike * beta[..., None]  # solve_triangular takes the diagonal as ones and ignores what is above it
    wanted = beta[..., None] * (v - (k * total.exp()) @ state)
    written = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    y = (q * total.exp()) @ state + seen @ written
    state = state * total[:, -1].exp()[..., None] + (k * (total[:, -1:] - total).exp()).transpose(1, 2) @ written
    return y, state


def normalised(x: torch.Tensor, l2norm: bool) -> torch.Tensor:
    """``x`` in float32, divided by its length along the last axis if asked."""
    x = x.float()
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) if l2norm else x
