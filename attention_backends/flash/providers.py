"""Who brings flash kernels: the interface a provider fills. No torch here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

from ...cache.specs import AttentionSpec
from ...device import DeviceFacts
from ..interface import AttentionImpl, BuildRequest, Capabilities, LayerRequest, Probe
from ..selection import refusals
from ..workspace import StepLimits, Workspace


class FlashProvider(ABC):
    """One library's paged attention kernels behind the flash backend. Torch only in :meth:`build`."""

    name: str
    """What the user writes after ``--provider``."""
    device_types: frozenset[str]
    """Device types that it has an answer for, as ``torch.device`` calls them."""

    @abstractmethod
    def probe(self, device: DeviceFacts) -> Probe:
        """Whether the library is installed and loads here. Never raises; the reason says how to get it."""

    @abstractmethod
    def constraints(self, device: DeviceFacts) -> Capabilities:
        """What these kernels can do on ``device``, within what the flash backend declares. No probing."""

    def spec_refusal(self, spec: AttentionSpec) -> str | None:
        """What :class:`Capabilities` has no word for: why a layer that fits them is not served, or ``None``."""
        return None

    def invariance_refusal(self, spec: AttentionSpec, device: DeviceFacts) -> str | None:
        """Why a layer that these kernels serve is not served under batch invariance, or ``None``."""
        return None

    def workspace(self, request: LayerRequest, device: DeviceFacts, limits: StepLimits) -> Workspace:
        """What these kernels take beside the cache for such layers, at most."""
        return Workspace()

    def only_when_asked(self, device: DeviceFacts) -> str | None:
        """Why automatic choice passes over these kernels on ``device`` though they serve; ``None`` if it does not."""
        return None

    @abstractmethod
    def build(self, request: BuildRequest) -> AttentionImpl:
        """The kernels ready to run.

        :raises BackendError: when the request is outside :meth:`constraints`.
        """


def layer_refusals(provider: FlashProvider, request: LayerRequest, device: DeviceFacts) -> tuple[str, ...]:
    """What a layer asks that the provider's kernels do not have, a sentence each."""
    found = refusals(replace(provider.constraints(device), name=provider.name), request)
    beyond = provider.spec_refusal(request.spec)
    if beyond is None and not found and request.batch_invariant:
        beyond = provider.invariance_refusal(request.spec, device)
    return found if beyond is None else (*found, f"{provider.name} {beyond}")


def build_refusals(provider: FlashProvider, request: BuildRequest) -> tuple[str, ...]:
    """The same of a built request, with the block size, the layout and the promises that hold by then."""
    can, block = provider.constraints(request.device), request.block_size
    layer = LayerRequest(
        layer=0,
        spec=request.spec,
        dtype=request.dtype,
        soft_cap=request.soft_cap,
        sinks=request.sinks,
        encoder_only=request.encoder_only,
        batch_invariant=request.config.batch_invariant,
    )
    found = list(layer_refusals(provider, layer, request.device))
    if not can.dtypes:
        return tuple(found)
    if block % can.kernel_block_multiple:
        found.append(f"{provider.name} reads blocks of a multiple of {can.kernel_block_multiple} tokens, not {block}")
    if can.kernel_block_sizes and all(block % size for size in can.kernel_block_sizes):
        sizes = ", ".join(map(str, can.kernel_block_sizes))
        found.append(f"{provider.name} reads blocks of a multiple of one of {sizes} tokens, not {block}")
    if can.exact_block_sizes and block not in can.exact_block_sizes:
        sizes = ", ".join(map(str, can.exact_block_sizes))
        found.append(f"{provider.name} reads blocks of {sizes} tokens, not {block}")
    if request.layout is not None and request.layout not in can.layouts:
        found.append(f"{provider.name} reads pages in {', '.join(can.layouts)}, not {request.layout}")
    return tuple(found)


def describe(can: Capabilities) -> str:
    """Constraints in one sentence, for ``doctor`` and for pages."""
    if not can.dtypes:
        return "no kernels for this device"
    heads = f"up to {can.max_head_size}"
    if can.head_sizes:
        heads = " ".join(map(str, can.head_sizes))
    elif can.head_size_multiple > 1:
        heads += f", multiples of {can.head_size_multiple}"
    blocks = f"multiples of {can.kernel_block_multiple}" if can.kernel_block_multiple > 1 else "any"
    if can.kernel_block_sizes:
        blocks = f"multiples of one of {' '.join(map(str, can.kernel_block_sizes))}"
    if can.exact_block_sizes:
        blocks = " ".join(map(str, can.exact_block_sizes))
    features = (
        ("sliding window", can.sliding_window),
        ("soft cap", can.soft_cap),
        ("sinks", can.sinks),
        ("no causal mask", can.encoder_only),
        ("latent attention", can.mla),
        ("batch invariance", can.batch_invariant),
    )
    has = [name for name, there in features if there]
    lacks = [name for name, there in features if not there]
    parts = [
        f"computes in {', '.join(sorted(can.dtypes))}",
        f"reads K and V in {', '.join(sorted(can.kv_cache_dtypes))}" + (", the queries' own" * can.same_kv_dtype),
        f"head sizes {heads}",
        f"blocks {blocks}",
        f"pages {' '.join(can.layouts)}",
        f"has {', '.join(has) or 'nothing beyond the causal mask'}",
    ]
    return "; ".join([*parts, f"lacks {', '.join(lacks)}"] if lacks else parts)
