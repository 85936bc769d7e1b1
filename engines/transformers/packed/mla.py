"""Latent attention in packed forwards: models expand the stored latents of all requests, one after the other."""

from __future__ import annotations

import torch

from ....attention_backends.interface import AttentionCall
from ....cache.write import write_kv
from .context import running


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
