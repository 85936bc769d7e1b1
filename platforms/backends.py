"""A backend for every attention layer of a model, with the reason of each choice and every refusal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..attention_backends.interface import AttentionBackend, Capabilities, LayerRequest, Probe
from ..attention_backends.selection import Selection, group_refusals, layer_names, select_backend
from ..attention_backends.workspace import StepLimits, total_bytes
from ..device import DeviceFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelBackends:
    """What was chosen for a whole model."""

    by_layer: Mapping[int, AttentionBackend]
    """Per attention layer (the model's layer index)."""
    capabilities: Mapping[int, Capabilities]
    """Per attention layer what its backend declares on the device."""
    reasons: tuple[str, ...]
    """One sentence per backend that was chosen."""
    refusals: tuple[str, ...]
    """One sentence per backend and set of reasons, however many layers it holds for."""

    def workspace_bytes(self, requests: Sequence[LayerRequest], device: DeviceFacts, limits: StepLimits) -> int:
        """What the kernels of a step hold beside the cache at most, over all kinds of layers."""
        kinds = {(self.by_layer[x.layer].name, replace(x, layer=0)): self.by_layer[x.layer] for x in requests}
        return total_bytes(backend.workspace(request, device, limits) for (_, request), backend in kinds.items())


def choose_backends(
    requests: Sequence[LayerRequest],
    backends: Sequence[AttentionBackend],
    device: DeviceFacts,
    *,
    order: Sequence[str],
    asked: str | None,
    probes: Mapping[str, Probe] | None = None,
) -> ModelBackends:
    """Choose for each layer; layers that ask the same get the same.

    :param order: names in the platform's order; backends that it does not name come after, by name.
    :param asked: the one backend that the user named, or ``None``.
    :param probes: per backend what its probe found; ``None`` plans for a device that is not here.
    :raises BackendError: naming every refusal, if a layer finds no backend or not the one asked for.
    """
    rank = {name: position for position, name in enumerate(order)}
    candidates = sorted(backends, key=lambda one: (rank.get(one.name, len(rank)), one.last_choice, one.name))
    alike: dict[LayerRequest, Selection] = {}
    selections = []
    for request in requests:
        what = replace(request, layer=0)
        if what not in alike:
            alike[what] = select_backend(request, candidates, device, asked=asked, probes=probes)
        selections.append(alike[what].for_layer(request.layer))
    return ModelBackends(
        by_layer={found.layer: found.backend for found in selections},
        capabilities={found.layer: found.capabilities for found in selections},
        reasons=_reasons(selections),
        refusals=group_refusals(selections),
    )


def _reasons(selections: Sequence[Selection]) -> tuple[str, ...]:
    layers: dict[str, list[int]] = {}
    for found in selections:
        layers.setdefault(found.reason, []).append(found.layer)
    return tuple(f"backend: {layer_names(numbers)}: {reason}." for reason, numbers in layers.items())
