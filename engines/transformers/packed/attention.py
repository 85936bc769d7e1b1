"""The function that models call for attention in packed forwards, registered under ``PACKED_NAME``."""

from __future__ import annotations

from typing import Any

import torch

from ....attention_backends.interface import AttentionCall
from ....errors import BackendError
from ..attention import HARMLESS, PACKED_NAME
from .mla import attend_expanded, attend_latents
from .ops import operators

LATENTS = "makeready_latents"
"""The forward argument of models with latent attention: :data:`STORED` or :data:`EXPANDED`."""
STORED, EXPANDED = "stored", "expanded"
"""Attention gets this step's latents and reads the others from their pages, or gets all of them expanded."""


def register() -> None:
    """Make :func:`attend_packed` known to transformers; doing it again changes nothing."""
    from transformers import AttentionInterface

    operators()
    AttentionInterface.register(PACKED_NAME, attend_packed)


def attend_packed(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over the pages, for the layer that runs.

    :param query: (1, Hq, T, D).
    :param key: (1, Hk, T, D), this step's; for MLA its latents, or the expanded keys of all requests.
    :param value: as ``key``.
    :return: (1, T, Hq, Dv), contiguous, and no weights.
    :raises BackendError: for an argument that would change attention in a way no backend was told of.
    """
    latents = kwargs.pop(LATENTS, None)
    unknown = sorted(name for name, value in kwargs.items() if value is not None and name not in HARMLESS)
    if attention_mask is not None:
        unknown.append("attention_mask")
    if dropout:
        unknown.append("dropout")
    if latents == STORED:  # of these, attention over latents has the scale alone
        given = {"sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux}
        unknown += [name for name, value in given.items() if value is not None]
        unknown += ["is_causal"] if is_causal is False else []
    if unknown:
        raise BackendError(
            f"the model passes {', '.join(unknown)} to attention, which the engine does not know",
            option="attention",
            value=unknown,
            expected=["scaling"]
            if latents == STORED
            else ["scaling", "is_causal", "sliding_window", "softcap", "s_aux"],
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if latents == STORED:
        return attend_latents(module, query, key, value, scale), None
    packed = query[0].transpose(0, 1)
    if latents == EXPANDED:
        call = AttentionCall(scale=scale, causal=is_causal is not False, soft_cap=softcap, sinks=s_aux)
        return attend_expanded(packed.contiguous(), key[0], value[0], call)[None], None
    output = torch.ops.makeready.attention(
        packed, key[0].transpose(0, 1), value[0].transpose(0, 1), s_aux, scale, is_causal is not False,
        sliding_window, softcap,
    )  # fmt: skip
    return output[None], None
