"""The function that models call for attention, registered with transformers under :data:`NAME`."""

from __future__ import annotations

from typing import Any

import torch

from ...attention_backends.interface import AttentionCall
from ...errors import BackendError, IntegrityError
from .binding import AttentionLayer
from .paged_cache import PagedCache

NAME = "makeready"
"""No mask is registered under it, so that models build none. Must not contain the names transformers tests for."""

PACKED_NAME = "makeready_packed"
"""The same for packed steps."""

CONTEXT = "makeready_cache"
"""The forward argument that carries the step's :class:`PagedCache` to :func:`attend`."""

HARMLESS = frozenset(
    {"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states",
     "output_router_logits", "return_dict", "logits_to_keep", "position_embeddings"}
)  # fmt: skip
"""Arguments that models pass along and that do not change attention."""


def register() -> None:
    """Make :func:`attend` known to transformers; doing it again changes nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over the paged cache, for the layer whose K and V were written last.

    :param query: (B, Hq, T, D).
    :param key: what ``PagedCache.update`` returned; for MLA the expanded (B, Hk, longest, D).
    :param value: as ``key``.
    :return: (B, T, Hq, Dv), contiguous, and no weights.
    :raises BackendError: for an argument that would change attention in a way no backend was told of.
    """
    cache = kwargs.pop(CONTEXT, None)
    if not isinstance(cache, PagedCache):
        raise IntegrityError(
            f"attention {NAME!r} was called outside the engine: the forward got no {CONTEXT!r};"
            " close the engine to use the model without it"
        )
    layer = cache.take_attention_layer()
    call = _call(layer, query, attention_mask, dropout, scaling, kwargs)
    batch, heads, length, width = query.shape
    packed = query.transpose(1, 2).reshape(batch * length, heads, width)
    if layer.spec.mla:
        step = cache.step.metadata[layer.group]
        keys, values = _per_request(key, step.seq_lens_host), _per_request(value, step.seq_lens_host)
        output = layer.impl.forward_gathered(packed, keys, values, step, call)
    else:
        prepared = cache.step.prepared[layer.layer]
        output = layer.impl.forward(packed, layer.key, layer.value, prepared, call)
    return output.view(batch, length, heads, -1), None


def _call(
    layer: AttentionLayer,
    query: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> AttentionCall:
    """The model's arguments as numbers; what is left over must be harmless."""
    call = AttentionCall(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        causal=_pop(kwargs, "is_causal") is not False,
        sliding_window=_pop(kwargs, "sliding_window"),
        soft_cap=_pop(kwargs, "softcap"),
        sinks=_pop(kwargs, "s_aux"),
    )
    unknown = {name: value for name, value in kwargs.items() if value is not None and name not in HARMLESS}
    if attention_mask is not None:
        unknown["attention_mask"] = attention_mask
    if dropout:
        unknown["dropout"] = dropout
    if unknown:
        raise BackendError(
            f"layer {layer.layer} passes {', '.join(sorted(unknown))} to attention, which the engine does not know",
            option="attention",
            value=sorted(unknown),
            expected=["scaling", "is_causal", "sliding_window", "softcap", "s_aux"],
        )
    if call.sliding_window != layer.spec.sliding_window:
        raise BackendError(
            f"layer {layer.layer} attends over a sliding window of {call.sliding_window}, and its plan says"
            f" {layer.spec.sliding_window}",
            option="sliding_window",
            value=call.sliding_window,
            expected=layer.spec.sliding_window,
        )
    return call


def _pop(kwargs: dict[str, Any], name: str) -> Any:
    return kwargs.pop(name, None)


def _per_request(expanded: torch.Tensor, lengths: tuple[int, ...]) -> list[torch.Tensor]:
    """(B, H, longest, D) as one (length, H, D) per request."""
    return [expanded[index, :, :length].transpose(0, 1) for index, length in enumerate(lengths)]
