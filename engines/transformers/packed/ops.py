"""The operators that packed forwards call, opaque to compilers: attention and state mixers on the pages.

Each takes tensors and numbers, and looks up pages and step in :mod:`.context`. They change pages behind torch's back,
which is sound because every call's inputs come from the call before it in the same layer, and its output is used.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from ....attention_backends.interface import AttentionCall
from ....cache.write import write_kv
from ....errors import BackendError, IntegrityError
from .context import Begun, ForwardContext, running
from .linears import like_linear_add, like_linears, linear_add, linears

_NAMESPACE = "makeready"
NO_LIMIT = (0.0, math.inf)
_SCHEMAS = {
    "attention": "(Tensor query, Tensor key, Tensor value, Tensor? sinks, float scale, bool causal, int? window,"
    " float? soft_cap) -> Tensor",
    "latent_attention": "(Tensor query, Tensor latent, Tensor rope, float scale) -> Tensor",
    "attention_begin": "(Tensor query, Tensor key, Tensor value, Tensor? sinks, float scale, bool causal, int? window,"
    " float? soft_cap) -> Tensor",
    "attention_end": "(Tensor begun) -> Tensor",
    "causal_conv": "(Tensor x, Tensor weight, Tensor? bias, str? activation) -> Tensor",
    "stacked_conv": "(Tensor x, Tensor weight, Tensor? bias, int count) -> Tensor",
    "delayed": "(Tensor x) -> Tensor",
    "mamba2": "(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, bool dt_softplus,"
    " float dt_min, float dt_max, int chunk_size) -> Tensor",
    "mamba1": "(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias,"
    " bool dt_softplus) -> Tensor",
    "gated_delta": "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, bool l2norm, float? scale) -> Tensor",
    "linears": "(Tensor x, Tensor[] weights) -> Tensor[]",
    "linear_add": "(Tensor x, Tensor weight, Tensor residual) -> Tensor",
    "kda": "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, bool l2norm, float? scale) -> Tensor",
}


@cache
def operators() -> Any:
    """The namespace of the operators, which the first call registers with torch."""
    library: Any = torch.library.Library(_NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
    implementations: dict[str, tuple[Any, Any]] = {
        "attention": (_attention, _like_attention),
        "latent_attention": (_latent_attention, _like_latent),
        "attention_begin": (_attention_begin, _like_begun),
        "attention_end": (_attention_end, _like_ended),
        "causal_conv": (_causal_conv, _like_first),
        "stacked_conv": (_stacked_conv, _like_stacked),
        "delayed": (_delayed, _like_first),
        "mamba2": (_mamba2, _like_first),
        "mamba1": (_mamba1, _like_first),
        "gated_delta": (_gated_delta, _like_value),
        "kda": (_kda, _like_value),
        "linears": (linears, like_linears),
        "linear_add": (linear_add, like_linear_add),
    }
    for name, (run, shape) in implementations.items():
        library.define(name + _SCHEMAS[name])
        library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{_NAMESPACE}::{name}", shape, lib=library)
    _KEPT.append(library)
    return getattr(torch.ops, _NAMESPACE)


_KEPT: list[Any] = []
"""Libraries last as long as their object does."""


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    causal: bool,
    window: int | None,
    soft_cap: float | None,
) -> torch.Tensor:
    """Write this step's K and V, then attend over the pages: (T, Hq, D), (T, Hk, D), (T, Hk, Dv) to (T, Hq, Dv)."""
    context = running()
    layer = context.attention_layer()
    if window != layer.spec.sliding_window:
        raise BackendError(
            f"layer {layer.layer} attends over a sliding window of {window}, and its plan says"
            f" {layer.spec.sliding_window}",
            option="sliding_window",
            value=window,
            expected=layer.spec.sliding_window,
        )
    write_kv(key, value, layer.key, layer.value, context.step.metadata[layer.group].slot_mapping)
    call = AttentionCall(scale=scale, causal=causal, sliding_window=window, soft_cap=soft_cap, sinks=sinks)
    return layer.impl.forward(query, layer.key, layer.value, context.step.prepared[layer.layer], call)


def _latent_attention(query: torch.Tensor, latent: torch.Tensor, rope: torch.Tensor, scale: float) -> torch.Tensor:
    """Write this step's latents, then attend over the pages: (T, Hq, R + P), (T, 1, R), (T, 1, P) to (T, Hq, R)."""
    context = running()
    layer = context.attention_layer()
    write_kv(latent, rope, layer.key, layer.value, context.step.metadata[layer.group].slot_mapping)
    call = AttentionCall(scale=scale)
    return layer.impl.forward_latent(query, layer.key, layer.value, context.step.prepared[layer.layer], call)


def _attention_begin(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *call: Any) -> torch.Tensor:
    """Attention on the stream aside, if the step has one, until :func:`_attention_end`; (0, T, Hq, Dv), the shape.

    What it reads stays in the context until then: compiled code drops it here, as copies of its own that nobody else
    reads, and the allocator would give that memory to the mixers beside.
    """
    context = running()
    if context.begun is not None:
        raise IntegrityError(f"layer {context.layer} begins an attention before another has ended")
    if context.aside is None:
        attended = _attention(query, key, value, *call)
    else:
        context.aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(context.aside):
            attended = _attention(query, key, value, *call)
    context.begun = Begun(attended, (query, key, value))
    return _like_begun(query, key, value)


def _attention_end(_: torch.Tensor) -> torch.Tensor:
    """What was begun."""
    context = running()
    begun, context.begun = context.begun, None
    if begun is None:
        raise IntegrityError(f"layer {context.layer} ends an attention that it has not begun")
    if context.aside is not None:
        torch.cuda.current_stream().wait_stream(context.aside)
    return begun.attended


def _causal_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None
) -> torch.Tensor:
    context = running()
    layer = context.state_layer("conv")
    return context.kernels.causal_conv(x, weight, bias, layer.conv[0], context.batch(layer), activation=activation)


def _stacked_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, count: int) -> torch.Tensor:
    """(T, C) through a depthwise convolution, for each token and the ``count - 1`` before it, oldest first."""
    context = running()
    layer = context.state_layer("conv")
    batch, state = context.batch(layer), layer.conv[0]
    copied = replace(batch, slots=torch.where(batch.slots < 0, -1, _numbers(batch.slots)))
    outputs = []
    for back in range(count - 1, -1, -1):
        taps = torch.nn.functional.pad(weight, (count - 1 - back, back))
        # Only the last writes the pages; the others shift copies of the states, which are then dropped.
        where = (state[batch.slots.clamp_min(0)], copied) if back else (state, batch)
        outputs.append(context.kernels.causal_conv(x, taps, bias, *where))
    return torch.stack(outputs)


def _numbers(slots: torch.Tensor) -> torch.Tensor:
    return torch.arange(slots.shape[0], dtype=slots.dtype, device=slots.device)


def _delayed(x: torch.Tensor) -> torch.Tensor:
    """(T, C) moved on by one token of its request; what comes before the first is the state."""
    context = running()
    layer = context.state_layer("recurrent")
    weight = torch.eye(2, dtype=x.dtype, device=x.device)[0].expand(x.shape[1], 2)  # all of the token before
    return context.kernels.causal_conv(x, weight, None, layer.recurrent[0].unsqueeze(-1), context.batch(layer))


def _mamba2(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    chunk_size: int,
) -> torch.Tensor:
    context = running()
    layer = context.state_layer("recurrent")
    # transformers clamps time steps in prefill and never in decode.
    return context.kernels.mamba2(
        x, dt, A, B, C, layer.recurrent[0], context.batch(layer), D=D, dt_bias=dt_bias, dt_softplus=dt_softplus,
        dt_limit=(dt_min, dt_max), decode_dt_limit=NO_LIMIT, chunk_size=chunk_size,
    )  # fmt: skip


def _mamba1(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    dt_softplus: bool,
) -> torch.Tensor:
    context = running()
    layer = context.state_layer("recurrent")
    return context.kernels.mamba1(
        x, dt, A, B, C, _scanned_state(context, layer.recurrent[0]), context.batch(layer), D=D, z=z,
        dt_bias=dt_bias, dt_softplus=dt_softplus,
    )  # fmt: skip


def _scanned_state(context: ForwardContext, pages: torch.Tensor) -> torch.Tensor:
    """Pages (num_slots, I, N), or those of the head that is scanned next where a layer has several."""
    return pages[:, context.next_scan_head()] if pages.dim() == 4 else pages


def _gated_delta(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    l2norm: bool,
    scale: float | None,
) -> torch.Tensor:
    context = running()
    layer = context.state_layer("recurrent")
    return context.kernels.gated_delta(
        q, k, v, g, beta, layer.recurrent[0], context.batch(layer), l2norm=l2norm, scale=scale
    )


def _kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    l2norm: bool,
    scale: float | None,
) -> torch.Tensor:
    context = running()
    layer = context.state_layer("recurrent")
    return context.kernels.kda(q, k, v, g, beta, layer.recurrent[0], context.batch(layer), l2norm=l2norm, scale=scale)


def _like_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
    return query.new_empty(query.shape[0], query.shape[1], value.shape[2])


def _like_latent(query: torch.Tensor, latent: torch.Tensor, *_: Any) -> torch.Tensor:
    return query.new_empty(query.shape[0], query.shape[1], latent.shape[2])


def _like_begun(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
    return query.new_empty(0, query.shape[0], query.shape[1], value.shape[2])


def _like_ended(begun: torch.Tensor) -> torch.Tensor:
    return begun.new_empty(begun.shape[1:])


def _like_first(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


def _like_stacked(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, count: int) -> torch.Tensor:
    return x.new_empty(count, *x.shape)


def _like_value(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
    return v.new_empty(v.shape)
