"""A backend for every attention layer of a model, with the reason of each choice and every refusal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..attention_backends.interface import AttentionBackend, LayerRequest, Probe
from ..attention_backends.selection import Selection, select_backend
from ..device import DeviceFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelBackends:
    """What was chosen for a whole model."""

    by_layer: Mapping[int, AttentionBackend]
    """Per attention layer (the model's layer index)."""
    reasons: tuple[str, ...]
    """One sentence per backend that was chosen."""
    refusals: tuple[str, ...]
    """One sentence per backend and set of reasons, however many layers it holds for."""


def choose_backends(
    requests: Sequence[LayerRequest],
    backends: Sequence[AttentionBackend],
    device: DeviceFacts,
    *,
    order: Sequence[str],
    asked: str | None,
    batch_invariant: bool = False,
    probes: Mapping[str, Probe] | None = None,
) -> ModelBackends:
    """Choose for each layer; layers that ask the same get the same.

    :param order: names in the platform's order; backends that it does not name come after, by name.
    :param asked: the one backend that the user named, or ``None``.
    :param probes: per backend what its probe found; ``None`` plans for a device that is not here.
    :raises BackendError: naming every refusal, if a layer finds no backend or not the one asked for.
    """
    rank = {name: position for position, name in enumerate(order)}
    candidates = sorted(backends, key=lambda backend: (rank.get(backend.name, len(rank)), backend.name))
    selections = {
        request.layer: select_backend(
            request, candidates, device, asked=asked, batch_invariant=batch_invariant, probes=probes
        )
        for request in requests
    }
    return ModelBackends(
        by_layer={layer: found.backend for layer, found in selections.items()},
        reasons=_reasons(selections, asked, candidates),
        refusals=_refusals(selections),
    )


def _reasons(
    selections: Mapping[int, Selection], asked: str | None, candidates: Sequence[AttentionBackend]
) -> tuple[str, ...]:
    layers: dict[str, list[int]] = {}
    for layer, found in selections.items():
        layers.setdefault(found.backend.name, []).append(layer)
    tried = ", ".join(candidate.name for candidate in candidates)
    why = "as asked" if asked is not None else f"the first of {tried} that serves them"
    return tuple(
        f"backend: {name} for {len(ids)} attention layer{'s' if len(ids) != 1 else ''}, {why}."
        for name, ids in layers.items()
    )


def _refusals(selections: Mapping[int, Selection]) -> tuple[str, ...]:
    layers: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for layer, found in selections.items():
        for refusal in found.refusals:
            layers.setdefault((refusal.backend, refusal.reasons), []).append(layer)
    return tuple(
        f"backend {name} ({len(ids)} layer{'s' if len(ids) != 1 else ''}): {'; '.join(reasons)}"
        for (name, reasons), ids in layers.items()
    )
