"""How a model's steps are run: packed or one after the other, compiled, captured, ahead of the host; and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...config import ExecutionConfig
from ...errors import ConfigError, UnsupportedModelError
from ..asked import PACKED_ONLY, require_followed, switch
from .families import Traits
from .records import Ready

if TYPE_CHECKING:
    from ...hybrid.mixers.interface import MixerKernels


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """The decisions, each with its reason."""

    packed: bool
    """One forward per step for all requests; else one for the decodes and one per prefill chunk."""
    kernels: MixerKernels | None
    """What computes state layers of packed steps; None without any."""
    compile_layers: bool
    cuda_graphs: bool
    """Whether steps of decodes are captured."""
    prefill_graphs: bool
    """Whether steps with prefill are, up to a number of tokens."""
    async_scheduling: bool
    reasons: tuple[str, ...]


def decide(model: Any, ready: Ready, traits: Traits) -> Execution:
    """Choose where the settings leave it open; an explicit setting is obeyed or refused.

    :raises ConfigError: for settings that clash.
    :raises UnsupportedModelError: for packed steps of a family that has none, where they were asked for.
    """
    require_followed(ready.config, model.device.type)
    asked, on_cuda = ready.config.execution, model.device.type == "cuda"
    packed, why = _choose_packed(model, ready, traits)
    reasons, kernels = [why], ready.mixers
    if not packed:
        _refuse_without_packing(asked, why)
        return Execution(
            packed=False, kernels=None, compile_layers=False, cuda_graphs=False, prefill_graphs=False,
            async_scheduling=False, reasons=tuple(reasons),
        )  # fmt: skip
    compiled, why = _choose_compile(asked, _expands(ready, traits), on_cuda)
    reasons.append(why)
    graphs, why = _choose_graphs(asked, _obstacle(model, ready, traits, kernels))
    reasons.append(why)
    prefill = graphs and not (why := _ragged_obstacle(ready, kernels))
    if graphs:
        reasons.append(f"prefill_graphs: {_on(prefill)}, {f'since {why}' if why else 'with cuda_graphs'}.")
    if ready.config.attention.batch_invariant:
        reasons.append(
            "batch_invariant: attention and state mixers; where a prompt is cut into chunks still depends on the other"
            " requests, and matrix products may round by the tokens of a step, or of the bucket that holds it."
        )
    ahead = on_cuda if asked.async_scheduling is None else asked.async_scheduling
    reasons.append(f"async_scheduling: {_on(ahead)}, {_why(asked.async_scheduling, model.device.type)}.")
    return Execution(
        packed=True, kernels=kernels, compile_layers=compiled, cuda_graphs=graphs, prefill_graphs=prefill,
        async_scheduling=ahead, reasons=tuple(reasons),
    )  # fmt: skip


def _choose_packed(model: Any, ready: Ready, traits: Traits) -> tuple[bool, str]:
    """Packed where kernels gain something, or where the user named them."""
    from .packed.patching import exchange_for

    asked, device = ready.config.execution.packed_steps, model.device.type
    named = ready.config.attention.mixer_backend != "auto"
    if asked is False:
        return False, "packed_steps: off, as asked."
    slow = ready.mixers is not None and ready.mixers.name == "reference"
    if not (asked or named) and (device != "cuda" or slow):
        why = "the reference mixers are made to be right, not fast" if slow else f"they gain nothing on {device}"
        return False, f"packed_steps: off, since {why}."
    try:
        exchange_for(model, traits)
    except UnsupportedModelError as error:
        if asked or named:
            raise
        return False, f"packed_steps: off, since {error}."
    mixers = f"with {ready.mixers.name} kernels for state layers" if ready.mixers else "no layer needs mixer kernels"
    return True, f"packed_steps: on, {_why(asked or named or None, device)}; {mixers}."


def _refuse_without_packing(asked: ExecutionConfig, why: str) -> None:
    for option in PACKED_ONLY:
        if getattr(asked, option):
            raise ConfigError(
                f"{switch(option)} needs packed steps, and there are none ({why.rstrip('.')}); add "
                f"{switch('packed_steps')}",
                option=option,
                value=True,
                expected=False,
            )


def _expands(ready: Ready, traits: Traits) -> str | None:
    """The attention backends for which the model must expand stored latents; None if it need not."""
    from .packed.patching import attends_latents

    if traits.expand_latents is None or attends_latents(ready, traits):
        return None
    return " and ".join(sorted({impl.name for impl in ready.attention.values() if not impl.attends_latents}))


def _choose_compile(asked: ExecutionConfig, expands: str | None, on_cuda: bool) -> tuple[bool, str]:
    if expands:
        reason = f"{expands} attention wants latents expanded, of every length, which would be compiled anew each time"
        if asked.compile_layers:
            raise ConfigError(
                f"{switch('compile_layers')}: {reason}", option="compile_layers", value=True, expected=False
            )
        return False, f"compile_layers: off, since {reason}."
    chosen = on_cuda if asked.compile_layers is None else asked.compile_layers
    return chosen, f"compile_layers: {_on(chosen)}, {_why(asked.compile_layers, 'cuda' if on_cuda else 'the host')}."


def _choose_graphs(asked: ExecutionConfig, obstacle: str | None) -> tuple[bool, str]:
    if asked.cuda_graphs is False:
        return False, "cuda_graphs: off, as asked."
    if obstacle is None:
        return True, f"cuda_graphs: on, {_why(asked.cuda_graphs, 'cuda')}."
    if asked.cuda_graphs:
        raise ConfigError(f"{switch('cuda_graphs')}: {obstacle}", option="cuda_graphs", value=True, expected=False)
    return False, f"cuda_graphs: off, since {obstacle}."


def _obstacle(model: Any, ready: Ready, traits: Traits, kernels: MixerKernels | None) -> str | None:
    """Why steps of decodes cannot be captured."""
    if model.device.type != "cuda":
        return "the model is not on a CUDA device"
    if expands := _expands(ready, traits):
        return f"{expands} attention wants latents of {traits.model_type} expanded, as many as there are tokens"
    waiting = sorted({impl.name for impl in ready.attention.values() if not impl.capturable})
    if waiting:
        return f"attention backend {' and '.join(waiting)} cannot run inside a graph"
    if kernels is not None and not kernels.capturable:
        return f"state mixers {kernels.name} cannot run inside a graph"
    experts = model.config._experts_implementation if model._can_set_experts_implementation() else None
    if experts == "eager" or (experts == "grouped_mm" and model.dtype is not torch.bfloat16):
        return (
            f"the experts' {experts} waits for the device in {str(model.dtype).removeprefix('torch.')};"
            " call model.set_experts_implementation('batched_mm')"
        )
    return None


def _ragged_obstacle(ready: Ready, kernels: MixerKernels | None) -> str:
    """Why steps with prefill cannot be captured though steps of decodes can; empty if they can."""
    if ready.config.attention.batch_invariant:
        return "whether a step is captured depends on the batch, and captured prefill reads K and V in another way"
    waiting = sorted({impl.name for impl in ready.attention.values() if not impl.captures_ragged})
    if waiting:
        return f"attention backend {' and '.join(waiting)} must know on the host who has how many tokens"
    if kernels is not None and not kernels.captures_ragged:
        return f"state mixers {kernels.name} must know on the host who has how many tokens"
    return ""


def _on(value: bool) -> str:
    return "on" if value else "off"


def _why(asked: bool | None, device: str) -> str:
    return f"the default on {device}" if asked is None else "as asked"
