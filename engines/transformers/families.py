"""Which model types the engine serves, what each asks of it, and why others are refused. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ...errors import UnsupportedModelError

MIN_TRANSFORMERS = (5, 17)
"""Oldest (major, minor) of transformers whose cache protocol the engine knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What the engine must know of a family beyond the shapes of its states."""

    model_type: str
    cache_argument: str = "past_key_values"
    """Name under which ``forward`` takes the cache."""
    takes_positions: bool = True
    """False for models without ``position_ids``: their layers have no notion of a position."""
    replays_generated: bool = False
    """After a preemption, generated tokens go through decode steps again: prefill would give other numbers."""
    single_token_chunks: bool = True
    """False if a prefill chunk of one token must not follow another: it would take the decode path."""
    scan: str | None = None
    """Module global that scans a mamba1 prefill from a zero state; the engine supplies the right one."""
    kernels: tuple[str, ...] = ()
    """Module globals, or methods as ``Class.method``, that compute the family's state mixers, for which packed steps
    have their own."""
    expand_latents: str | None = None
    """Method of the modeling module that expands stored latents to K and V; ``None`` for attention without latents."""
    note: str = ""
    """Why, for the record."""


_DT_CLAMP = (
    "transformers clamps dt at time_step_min in prefill and not in decode, so that a token's numbers depend on"
    " the path it took; generated tokens are replayed through decode after a preemption"
)
_SCAN = (
    "transformers starts the scan of every multi-token forward from a zero state; the engine supplies the state"
    " of the chunk before"
)

_CONV = "causal_conv1d_fn"
_MAMBA1 = (_CONV, "mamba_selective_scan")
_MAMBA2 = (_CONV, "mamba2_chunk_scan")
_DELTA = (_CONV, "torch_chunk_gated_delta_rule")

_FAMILIES: tuple[Traits, ...] = (
    Traits(model_type="bamba", kernels=_MAMBA2),
    Traits(model_type="falcon_h1", kernels=_MAMBA2),
    Traits(model_type="falcon_mamba", kernels=_MAMBA1, cache_argument="cache_params", takes_positions=False,
           scan="mamba_selective_scan", note=_SCAN),
    Traits(model_type="granitemoehybrid", kernels=_MAMBA2),
    Traits(model_type="jamba", kernels=_MAMBA1, scan="mamba_selective_scan", note=_SCAN),
    Traits(model_type="kimi_linear", kernels=(_CONV, "chunk_kimi_delta_attention"),
           expand_latents="KimiLinearAttention.expand_kv"),
    Traits(model_type="lfm2", kernels=(_CONV,)),
    Traits(model_type="lfm2_moe", kernels=(_CONV,)),
    Traits(model_type="mamba", kernels=_MAMBA1, cache_argument="cache_params", takes_positions=False,
           scan="mamba_selective_scan", note=_SCAN),
    Traits(model_type="mamba2", kernels=_MAMBA2, cache_argument="cache_params", takes_positions=False),
    Traits(model_type="nemotron_h", kernels=_MAMBA2, replays_generated=True, single_token_chunks=False, note=_DT_CLAMP),
    Traits(model_type="olmo_hybrid", kernels=_DELTA),
    Traits(model_type="qwen3_5_moe_text", kernels=_DELTA),
    Traits(model_type="qwen3_5_text", kernels=_DELTA),
    Traits(model_type="qwen3_next", kernels=_DELTA),
    Traits(model_type="zamba", kernels=_MAMBA1, scan="mamba_selective_scan", note=_SCAN),
    Traits(model_type="zamba2", kernels=_MAMBA2, replays_generated=True, single_token_chunks=False, note=_DT_CLAMP),
    Traits(model_type="zaya", kernels=("ZayaCCAProjection.forward",)),
    Traits(model_type="llama"),
    Traits(model_type="gemma2"),
    Traits(model_type="gemma3_text"),
    Traits(model_type="gpt_oss"),
)  # fmt: skip

TRAITS: Mapping[str, Traits] = MappingProxyType({traits.model_type: traits for traits in _FAMILIES})
"""Families that were run token by token against ``model.generate``."""

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "recurrent_gemma": "it keeps its recurrent state inside the module, where requests would share it",
        "qwen3_5": "it takes images; load its text model, of type qwen3_5_text",
        "qwen3_5_moe": "it takes images; load its text model, of type qwen3_5_moe_text",
    }
)
"""Families that are known not to work, with the reason."""


def traits_of(model_type: str) -> Traits:
    """Traits of the family ``model_type``.

    :raises UnsupportedModelError: for a family that is not served, with the reason.
    """
    if model_type in TRAITS:
        return TRAITS[model_type]
    reason = REFUSED.get(model_type, "it was never run against model.generate on this cache")
    raise UnsupportedModelError(
        f"model type {model_type!r} is not served by the embedded engine: {reason}; served are {', '.join(TRAITS)}",
        option="model_type",
        value=model_type,
        expected=sorted(TRAITS),
    )


def check_version(version: str) -> None:
    """Refuse a transformers ``version`` whose cache protocol the engine does not know.

    :raises UnsupportedModelError: naming the version found and the oldest that works.
    """
    match = re.match(r"(\d+)\.(\d+)", version)
    found = (int(match.group(1)), int(match.group(2))) if match else (0, 0)
    if found < MIN_TRANSFORMERS:
        oldest = ".".join(map(str, MIN_TRANSFORMERS))
        raise UnsupportedModelError(
            f"transformers {version} is older than {oldest}, whose cache protocol the engine needs",
            option="transformers",
            value=version,
            expected=f">= {oldest}",
        )
