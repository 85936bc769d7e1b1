"""Latent attention in packed forwards: over the stored latents themselves, or over what the model expands them to."""

from __future__ import annotations

import torch

from ....attention_backends.interface import AttentionCall
from ....cache.write import write_kv
from .context import running


def keep_latents(
    module: torch.nn.Module, kv_nope: torch.Tensor, k_rot: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stands in for the model's ``expand_kv``: this step's latents, (1, 1, T, R) and (1, 1, T, P), as they are."""
    return kv_nope, k_rot


def attend_latents(
    module: torch.nn.Module, query: torch.Tensor, latent: torch.Tensor, rope: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention of the step over the stored latents, this step's included.

    ``kv_b_proj`` makes K and V of a latent. What it does to K is done to the queries instead, and what it does to V to
    the outputs, so that nothing is expanded: (q W_K) latent is q (W_K latent).

    :param query: (1, Hq, T, N + P), the last P of them rotary.
    :param latent: (1, 1, T, R).
    :param rope: (1, 1, T, P).
    :return: (1, T, Hq, Dv), contiguous.
    """
    heads, width, rank = query.shape[1], query.shape[3] - rope.shape[3], latent.shape[3]
    weight = module.kv_b_proj.weight.view(heads, -1, rank)  # type: ignore[union-attr, operator]
    known, rotary = query[0, :, :, :width], query[0, :, :, width:]
    packed = torch.cat([torch.bmm(known, weight[:, :width]), rotary], dim=-1).transpose(0, 1).contiguous()
    seen = torch.ops.makeready.latent_attention(packed, latent[0].transpose(0, 1), rope[0].transpose(0, 1), scale)
    output = torch.bmm(seen.transpose(0, 1), weight[:, width:].transpose(1, 2))
    return output.transpose(0, 1).contiguous()[None]


def gather_latents(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Write this step's latents, (1, 1, T, D) each, and return those of every request's tokens.

    :return: (1, 1, sum of sequence lengths, D) each, request after request.
    """
    context = running()
    layer = context.attention_layer()
    metadata = context.step.metadata[layer.group]
    write_kv(key[0].transpose(0, 1), value[0].transpose(0, 1), layer.key, layer.value, metadata.slot_mapping)
    device, size = key.device, metadata.block_size
    rows, offsets = [], []
    for row, length in enumerate(metadata.seq_lens_host):
        positions = torch.arange(length, device=device)
        rows.append(metadata.block_table[row].long()[positions // size])
        offsets.append(positions % size)
    blocks, places = torch.cat(rows), torch.cat(offsets)
    keys, values = (
        pages[blocks, places].transpose(0, 1)[None].to(states.dtype)
        for pages, states in ((layer.key, key), (layer.value, value))
    )
    return keys, values


def attend_expanded(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """Attention of (T, Hq, D) queries over what a model made of :func:`gather_latents`'s result.

    :param key: (Hk, sum of sequence lengths, D); ``value`` alike.
    :return: (T, Hq, Dv).
    """
    context = running()
    layer = context.attention_layer()
    metadata = context.step.metadata[layer.group]
    lengths = list(metadata.seq_lens_host)
    keys, values = ([part.transpose(0, 1) for part in torch.split(states, lengths, dim=1)] for states in (key, value))
    return layer.impl.forward_gathered(query, keys, values, metadata, call)
