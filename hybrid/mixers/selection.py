"""Which mixer kernels serve a model's state layers, and why the others do not. No torch: probes come in as values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ...attention_backends.interface import Capabilities, Probe
from ...attention_backends.selection import layer_names
from ...cache.block_size import Constraint
from ...cache.specs import LayerSpec, MambaSpec
from ...device import DeviceFacts
from ...errors import BackendError
from .backend import MIXERS, MixerBackend, MixerRequest

ORDER: tuple[str, ...] = ("triton", "fla", "mamba-ssm", "causal-conv1d", "reference")
"""What automatic selection tries, best first; kernels of plugins that it does not name come before."""


class Probes(Mapping[str, Probe]):
    """Per name what its probe finds on a device; each is asked once, when selection comes to it.

    A probe of a library imports it, which takes seconds that a model for which others serve should not pay.
    """

    def __init__(self, backends: Sequence[MixerBackend], device: DeviceFacts) -> None:
        self._backends = {backend.name: backend for backend in backends}
        self._device = device
        self._found: dict[str, Probe] = {}

    def __getitem__(self, name: str) -> Probe:
        if name not in self._found:
            self._found[name] = self._backends[name].probe(self._device)
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._backends)

    def __len__(self) -> int:
        return len(self._backends)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelMixers:
    """One set of kernels for all state layers of a model."""

    backend: MixerBackend
    capabilities: Capabilities
    """What it declared on the device."""
    reasons: tuple[str, ...]
    """Why this one."""
    refusals: tuple[str, ...]
    """One sentence per set of kernels that cannot serve."""
    constraints: tuple[Constraint, ...] = ()
    """What these kernels ask of the block size."""


def mixer_requests(layers: Sequence[LayerSpec], dtype: str) -> tuple[MixerRequest, ...]:
    """What each state layer asks of mixer kernels; layers that mix their states by themselves ask nothing."""
    return tuple(
        MixerRequest(
            layer=layer.layer,
            kind=layer.spec.kind,
            dtype=dtype,
            state_dtypes=tuple(state.dtype for state in layer.spec.states),
        )
        for layer in layers
        if isinstance(layer.spec, MambaSpec) and layer.spec.kind in MIXERS
    )


def choose_mixers(
    requests: Sequence[MixerRequest],
    backends: Sequence[MixerBackend],
    device: DeviceFacts,
    *,
    asked: str = "auto",
    batch_invariant: bool = False,
    probes: Mapping[str, Probe] | None = None,
) -> ModelMixers | None:
    """The kernels asked for, or the first that can serve every request; ``None`` where nothing is requested.

    :param asked: ``auto`` or a name; a name serves or this raises, nothing takes its place.
    :param batch_invariant: only kernels whose results for a request do not depend on the others of its step.
    :param probes: per name what its probe found (:class:`Probes`); ``None`` plans for a device that is not here.
    :raises BackendError: for an unknown name, or with every reason when nothing can serve.
    """
    known = [backend.name for backend in backends]
    if asked != "auto" and asked not in known:
        said = f"mixer_backend {asked!r} is not known on {device.platform}; known are auto, {', '.join(known)}"
        raise _error(said, asked, known)
    if not requests:
        return None
    rank = {name: position for position, name in enumerate(ORDER)}
    candidates = [
        backend
        for backend in sorted(backends, key=lambda backend: (rank.get(backend.name, -1), backend.name))
        if asked in ("auto", backend.name)
    ]
    refused: list[str] = []
    for backend in candidates:
        reasons = refusals(backend, requests, device, probes, batch_invariant=batch_invariant)
        if reasons:
            served = layer_names(request.layer for request in requests)
            refused.append(f"{backend.name} cannot compute the states of {served}: {'; '.join(reasons)}")
            continue
        return ModelMixers(
            backend=backend,
            capabilities=backend.capabilities(device),
            reasons=(_why(backend, requests, device, asked, len(refused)),),
            refusals=tuple(refused),
            constraints=backend.block_size_constraints(frozenset(request.kind for request in requests), device),
        )
    said = f"mixer_backend {asked!r} was asked for, and " if asked != "auto" else f"on {device.platform} "
    raise _error(said + " | ".join(refused or ["no mixer kernels are registered"]), asked, known)


def refusals(
    backend: MixerBackend,
    requests: Sequence[MixerRequest],
    device: DeviceFacts,
    probes: Mapping[str, Probe] | None,
    *,
    batch_invariant: bool = False,
) -> tuple[str, ...]:
    """What the requests ask and the kernels do not have: one sentence each; empty if they can serve."""
    can, name = backend.capabilities(device), backend.name
    if not can.is_ssm:
        return (f"{name} is no state mixer",)
    if not can.dtypes:
        return (f"{name} has no kernels for this device",)
    reasons = []
    for kind in sorted({request.kind for request in requests} - backend.mixers(device)):
        why = backend.why_not(kind)
        reasons.append(f"{name} has no {kind}" + (f": {why}" if why else ""))
    for dtype in sorted({request.dtype for request in requests} - can.dtypes):
        reasons.append(f"{name} computes in {', '.join(sorted(can.dtypes))}, and the layers in {dtype}")
    for dtype in sorted({dtype for request in requests for dtype in request.state_dtypes} - can.kv_cache_dtypes):
        reasons.append(f"{name} keeps states in {', '.join(sorted(can.kv_cache_dtypes))}, and the cache holds {dtype}")
    if batch_invariant and not can.batch_invariant:
        reasons.append(f"batch_invariant is asked, and what {name} computes for a request depends on the batch")
    if probes is not None:
        probe = probes.get(name)
        if probe is None:
            reasons.append(f"{name} was not probed on this device")
        elif not probe.available:
            reasons.append(probe.reason)
    return tuple(reasons)


def _why(backend: MixerBackend, requests: Sequence[MixerRequest], device: DeviceFacts, asked: str, refused: int) -> str:
    if asked != "auto":
        why = "as asked"
    elif refused:
        why = f"the first on {device.platform} that can serve"
    else:
        why = f"the first choice on {device.platform}"
    return f"mixers: {layer_names(request.layer for request in requests)}: {backend.name}, {why}."


def _error(message: str, asked: str, known: Sequence[str]) -> BackendError:
    return BackendError(message, option="mixer_backend", value=asked, expected=["auto", *known])
