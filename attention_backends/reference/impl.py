"""The reference on the device: gather, scores, mask, softmax, in float32, one request after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..interface import AttentionCall, AttentionImpl
from ..metadata import StepMetadata


class ReferenceAttention(AttentionImpl):
    """Reads exactly the tokens that a request's queries can see, so poisoned memory elsewhere is harmless."""

    name = "reference"
    attends_latents = True

    def prepare(self, step: StepMetadata) -> StepMetadata:
        """The step itself: nothing is shared beyond it."""
        return step

    def forward(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        metadata: StepMetadata,
        call: AttentionCall,
    ) -> torch.Tensor:
        """Attention over the paged cache; shapes as in :class:`AttentionImpl`."""
        call.refuse_own_masks(self.name)
        output = query.new_empty(*query.shape[:2], value_cache.shape[-1])
        for index, (start, q_len, seq_len) in enumerate(_spans(metadata)):
            positions = torch.arange(_first_visible(q_len, seq_len, call), seq_len, device=query.device)
            blocks = metadata.block_table[index].long()[positions // metadata.block_size]
            offsets = positions % metadata.block_size
            output[start : start + q_len] = attend(
                query[start : start + q_len],
                key_cache[blocks, offsets],
                value_cache[blocks, offsets],
                seq_len,
                call,
            )
        return output

    def forward_gathered(
        self,
        query: torch.Tensor,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        step: StepMetadata,
        call: AttentionCall,
    ) -> torch.Tensor:
        """Attention over K and V that were gathered per request; shapes as in :class:`AttentionImpl`."""
        call.refuse_own_masks(self.name)
        width = values[0].shape[-1] if values else query.shape[-1]
        output = query.new_empty(*query.shape[:2], width)
        for (start, q_len, seq_len), key, value in zip(_spans(step), keys, values, strict=True):
            first = _first_visible(q_len, seq_len, call)
            output[start : start + q_len] = attend(
                query[start : start + q_len], key[first:seq_len], value[first:seq_len], seq_len, call
            )
        return output


    def forward_latent(
        self,
        query: torch.Tensor,
        latent_cache: torch.Tensor,
        rope_cache: torch.Tensor,
        metadata: StepMetadata,
        call: AttentionCall,
    ) -> torch.Tensor:
        """Attention over stored latents; shapes as in :class:`AttentionImpl`."""
        call.refuse_own_masks(self.name)
        output = query.new_empty(*query.shape[:2], latent_cache.shape[-1])
        for index, (start, q_len, seq_len) in enumerate(_spans(metadata)):
            positions = torch.arange(seq_len, device=query.device)
            blocks = metadata.block_table[index].long()[positions // metadata.block_size]
            offsets = positions % metadata.block_size
            latents = latent_cache[blocks, offsets]
            keys = torch.cat([latents, rope_cache[blocks, offsets]], dim=-1)
            output[start : start + q_len] = attend(query[start : start + q_len], keys, latents, seq_len, call)
        return output


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seq_len: int, call: AttentionCall
) -> torch.Tensor:
    """Attention of one request's last queries over its last keys.

    :param query: (Q, Hq, D), the queries of positions ``seq_len - Q`` to ``seq_len - 1``.
    :param key: (L, Hk, D), the keys of positions ``seq_len - L`` to ``seq_len - 1``.
    :param value: (L, Hk, Dv), as ``key``.
    :return: (Q, Hq, Dv) in the query's dtype.
    """
    q_len, num_heads, _ = query.shape
    length, num_kv_heads, _ = key.shape
    # Fresh copies: where a slice starts in memory must not decide how a matrix product rounds.
    q = query.to(torch.float32, copy=True).reshape(q_len, num_kv_heads, num_heads // num_kv_heads, -1)
    k = key.to(torch.float32, copy=True)
    v = value.to(torch.float32, copy=True)
    scores = torch.einsum("qhgd,khd->hgqk", q, k) * (call.scale * call.key_scale)
    if call.soft_cap is not None:
        scores = call.soft_cap * torch.tanh(scores / call.soft_cap)
    q_pos = torch.arange(seq_len - q_len, seq_len, device=query.device)
    k_pos = torch.arange(seq_len - length, seq_len, device=query.device)
    if call.alibi_slopes is not None:
        slopes = call.alibi_slopes.float().view(num_kv_heads, -1, 1, 1)
        scores = scores + slopes * (k_pos[None, :] - q_pos[:, None])
    scores = scores.masked_fill(~visible(q_pos[:, None], k_pos[None, :], call), float("-inf"))
    weights = _softmax(scores, call.sinks)
    output = torch.einsum("hgqk,khd->qhgd", weights, v) * call.value_scale
    return output.reshape(q_len, num_heads, -1).to(query.dtype)


def visible(q_pos: torch.Tensor, k_pos: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """Which keys a query sees, by position: the mask of every backend in one place.

    Without ``causal`` a sliding window reaches as far ahead as it reaches back.
    """
    distance = q_pos - k_pos
    seen = distance >= 0 if call.causal else torch.ones_like(distance, dtype=torch.bool)
    if call.sliding_window is not None:
        seen = seen & (distance.abs() < call.sliding_window)
    return seen


def _softmax(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Softmax over keys of (Hk, G, Q, L); a sink is one more logit per head, with no value behind it."""
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    sink = sinks.float().view(scores.shape[0], scores.shape[1], 1, 1).expand(*scores.shape[:3], 1)
    return torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]


def _spans(step: StepMetadata) -> list[tuple[int, int, int]]:
    """(first query row, query tokens, sequence length) of every request."""
    spans, start = [], 0
    for q_len, seq_len in zip(step.query_lens_host, step.seq_lens_host, strict=True):
        spans.append((start, q_len, seq_len))
        start += q_len
    return spans


def _first_visible(q_len: int, seq_len: int, call: AttentionCall) -> int:
    """The first position that any query sees; earlier blocks may have gone to another request."""
    if call.sliding_window is None:
        return 0
    return max(0, seq_len - q_len - call.sliding_window + 1)
