"""Which backend serves a layer, and why every other one does not. No torch: probes come in as values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..device import DeviceFacts
from ..errors import BackendError
from .interface import AttentionBackend, Capabilities, LayerRequest, Probe


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why one backend cannot serve one layer."""

    backend: str
    layer: int
    reasons: tuple[str, ...]
    """Sentences, each with the two values that clash."""

    def sentence(self) -> str:
        """All of it in one line."""
        return f"{self.backend} cannot serve layer {self.layer}: {'; '.join(self.reasons)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The backend of one layer."""

    layer: int
    backend: AttentionBackend
    capabilities: Capabilities
    """What the backend declared on the device."""
    reason: str
    """Why this one, in a sentence."""
    refusals: tuple[Refusal, ...]
    """Every candidate that could not have served."""

    def for_layer(self, layer: int) -> Selection:
        """The same for another layer that asks the same."""
        # A model has tens of layers and vLLM tens of kernels: dataclasses.replace would take most of a plan's time.
        refused = tuple(Refusal(backend=r.backend, layer=layer, reasons=r.reasons) for r in self.refusals)
        return replace(self, layer=layer, refusals=refused)


def refusals(capabilities: Capabilities, request: LayerRequest) -> tuple[str, ...]:
    """What the layer asks that the capabilities do not hold: one sentence each; empty if the backend can serve."""
    if not capabilities.dtypes:
        return (_no_kernels(capabilities.name),)
    if capabilities.mla_only and not request.spec.mla:
        return (f"{capabilities.name} serves latent attention (MLA) only, and the layer has heads of K and V",)
    if capabilities.is_ssm:
        return (f"{capabilities.name} is a state mixer, and the layer is attention",)
    return (
        *_dtype_refusals(capabilities, request),
        *_size_refusals(capabilities, request),
        *_missing(capabilities, request),
    )


def select_backend(
    request: LayerRequest,
    candidates: Sequence[AttentionBackend],
    device: DeviceFacts,
    *,
    asked: str | None = None,
    probes: Mapping[str, Probe] | None = None,
) -> Selection:
    """The backend of a layer: the one asked for, or the first candidate that can serve.

    :param candidates: best first.
    :param asked: a backend's name; it serves or this raises, nothing takes its place.
    :param probes: per backend name what its probe found; ``None`` plans without the device and assumes that
        everything is installed.
    :raises BackendError: for an unknown name, or when nothing can serve, with every reason.
    """
    known = [candidate.name for candidate in candidates]
    if asked is not None and asked not in known:
        raise BackendError(
            f"backend {asked!r} is not known on {device.platform}; known are {', '.join(known) or 'none'}",
            option="backend",
            value=asked,
            expected=known,
        )
    refused: list[Refusal] = []
    fitting: list[tuple[AttentionBackend, Capabilities]] = []
    for candidate in candidates:
        if asked is not None and candidate.name != asked:
            continue
        capabilities = candidate.capabilities(device)
        reasons = list(refusals(capabilities, request))
        if not reasons:
            reasons += candidate.declared_refusals(request, device)
        reasons += _probe_refusals(candidate.name, probes)
        if not reasons and probes is not None:
            reasons += candidate.refusals(request, device)
        if reasons:
            refused.append(Refusal(backend=candidate.name, layer=request.layer, reasons=tuple(reasons)))
        else:
            fitting.append((candidate, capabilities))
    if not fitting:
        raise _nothing_fits(request, device, asked, known, refused)
    backend, capabilities = fitting[0]
    return Selection(
        layer=request.layer,
        backend=backend,
        capabilities=capabilities,
        reason=_why(backend.name, device, asked, refused, known),
        refusals=tuple(refused),
    )


def group_refusals(selections: Iterable[Selection]) -> tuple[str, ...]:
    """The refusals of a whole model, one sentence for all layers that a backend refuses for the same reasons."""
    layers: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for selection in selections:
        for refusal in selection.refusals:
            layers.setdefault((refusal.backend, refusal.reasons), []).append(refusal.layer)
    return tuple(
        f"{backend} cannot serve {layer_names(numbers)}: {'; '.join(reasons)}"
        for (backend, reasons), numbers in layers.items()
    )


def layer_names(numbers: Iterable[int]) -> str:
    """``layer 3`` or ``layers 0-3, 7``."""
    distinct = set(numbers)
    return f"layer{'s' if len(distinct) > 1 else ''} {number_ranges(distinct)}"


def number_ranges(numbers: Iterable[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _no_kernels(name: str) -> str:
    return f"{name} has no kernels for this device"


def _dtype_refusals(capabilities: Capabilities, request: LayerRequest) -> list[str]:
    name, stored = capabilities.name, request.spec.dtype
    reasons = []
    if request.dtype not in capabilities.dtypes:
        reasons.append(f"{name} computes in {_listed(capabilities.dtypes)}, and the layer in {request.dtype}")
    if stored not in capabilities.kv_cache_dtypes:
        reasons.append(f"{name} reads K and V in {_listed(capabilities.kv_cache_dtypes)}, and the cache holds {stored}")
    elif capabilities.same_kv_dtype and stored != request.dtype:
        reasons.append(f"{name} reads K and V only in the queries' dtype {request.dtype}, and the cache holds {stored}")
    return reasons


def _size_refusals(capabilities: Capabilities, request: LayerRequest) -> list[str]:
    spec, name = request.spec, capabilities.name
    if spec.mla:  # what is stored is a latent: the kernel never sees its width
        return []
    reasons = []
    for size in sorted({spec.head_size, spec.head_size_v}):
        if capabilities.head_sizes:
            if size not in capabilities.head_sizes:
                reasons.append(f"{name} serves head sizes {_listed(capabilities.head_sizes)}, and the layer has {size}")
        elif size > capabilities.max_head_size:
            reasons.append(f"{name} serves head sizes up to {capabilities.max_head_size}, and the layer has {size}")
        elif size % capabilities.head_size_multiple:
            multiple = capabilities.head_size_multiple
            reasons.append(f"{name} serves head sizes that are multiples of {multiple}, and the layer has {size}")
    if spec.num_query_heads % spec.num_kv_heads:
        reasons.append(f"{spec.num_query_heads} query heads are no multiple of {spec.num_kv_heads} KV heads")
    return reasons


def _missing(capabilities: Capabilities, request: LayerRequest) -> list[str]:
    spec, name = request.spec, capabilities.name
    window, cap = spec.sliding_window, request.soft_cap
    asked = (
        (window is not None, capabilities.sliding_window, f"sliding window, and the layer's is {window}"),
        (cap is not None, capabilities.soft_cap, f"soft cap, and the layer's is {cap}"),
        (request.sinks, capabilities.sinks, "attention sinks, and the layer has them"),
        (request.encoder_only, capabilities.encoder_only, "attention without a causal mask, and the layer asks it"),
        (spec.mla, capabilities.mla, f"latent attention (MLA), and the layer stores a latent of {spec.head_size}"),
    )
    found = [f"{name} has no {sentence}" for wanted, declared, sentence in asked if wanted and not declared]
    if request.batch_invariant and not capabilities.batch_invariant:
        found.append(f"batch_invariant is asked, and the output of {name} depends on the batch")
    return found


def _probe_refusals(name: str, probes: Mapping[str, Probe] | None) -> list[str]:
    if probes is None:
        return []
    if name not in probes:
        return [f"{name} was not probed on this device"]
    return [] if probes[name].available else [probes[name].reason]


def _listed(values: Iterable[str] | Iterable[int]) -> str:
    return ", ".join(str(value) for value in sorted(values)) or "none"


def _why(name: str, device: DeviceFacts, asked: str | None, refused: Sequence[Refusal], known: Sequence[str]) -> str:
    if asked is not None:
        return f"{name}, as asked"
    before = [refusal.backend for refusal in refused if known.index(refusal.backend) < known.index(name)]
    if not before:
        return f"{name}, the first choice on {device.platform}"
    return f"{name}, the first on {device.platform} that can serve; before it {', '.join(before)} cannot"


def _nothing_fits(
    request: LayerRequest, device: DeviceFacts, asked: str | None, known: Sequence[str], refused: Sequence[Refusal]
) -> BackendError:
    if asked is not None:
        message = f"backend {asked!r} was asked for, and {refused[0].sentence()}"
    elif refused:
        foreign = [one.backend for one in refused if one.reasons[:1] == (_no_kernels(one.backend),)]
        said = ["; ".join(one.reasons) for one in refused if one.backend not in foreign]
        if foreign:
            said.append(f"{', '.join(foreign)} {'have' if len(foreign) > 1 else 'has'} no kernels for this device")
        message = f"no backend on {device.platform} can serve layer {request.layer}: {' | '.join(dict.fromkeys(said))}"
    else:
        message = f"no backend is registered on {device.platform} for layer {request.layer}"
    return BackendError(message, option="backend", value=asked, expected=list(known))
