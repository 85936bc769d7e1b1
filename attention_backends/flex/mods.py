"""Masks for ``AttentionCall.mask_mod``, in the positions of each request's own sequence.

A modifier is called with tensors: ``mask_mod(request, head, query, key)``, where ``request`` counts in the order of
the step and ``query`` and ``key`` are positions in the request's sequence, wherever its blocks lie. It narrows what
``causal`` and ``sliding_window`` leave. Make one per model rather than one per step, and keep what changes in tensors
that it reads: torch compiles a function once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

MaskMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def prefix_lm(prefix_lens: torch.Tensor) -> MaskMod:
    """Every query sees its request's prefix, and of the rest what lies before it; needs ``causal=False``.

    :param prefix_lens: (B,) int32, tokens of each request's prefix.
    """

    def mask(request: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key < prefix_lens[request]) | (key <= query)

    return mask


def documents(document_ids: torch.Tensor) -> MaskMod:
    """Queries see keys of their own document.

    :param document_ids: (B, positions) int32.
    """

    def mask(request: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return document_ids[request, query] == document_ids[request, key]

    return mask


def both(first: MaskMod, second: MaskMod) -> MaskMod:
    """What both masks leave."""

    def mask(request: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return first(request, head, query, key) & second(request, head, query, key)

    return mask
