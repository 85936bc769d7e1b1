"""What flash attention declares on each platform, and the choice of a provider. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from ...config import LAYOUTS, AttentionConfig
from ...device import DeviceFacts
from ...errors import BackendError
from ..interface import AttentionBackend, AttentionImpl, BuildRequest, Capabilities, LayerRequest, Probe, ProviderFacts
from ..workspace import StepLimits, Workspace, total_bytes
from .flash_attention_3 import FlashAttention3
from .flash_attention_4 import FlashAttention4
from .ipex import IpexProvider
from .providers import FlashProvider, build_refusals, describe, layer_refusals
from .torch_varlen import TorchVarlen
from .triton_kernels import TritonProvider
from .xpu_kernels import XpuKernels

HALF = frozenset({"bfloat16", "float16"})
FP8 = frozenset({"fp8_e4m3", "fp8_e5m2"})

POLICY: Mapping[str, Capabilities] = MappingProxyType(
    {
        "cuda": Capabilities(
            name="flash",
            dtypes=HALF,
            kv_cache_dtypes=HALF | FP8,
            kernel_block_multiple=16,
            head_size_multiple=8,
            max_head_size=256,
            layouts=LAYOUTS,
            sliding_window=True,
            soft_cap=True,
            sinks=True,
        ),
        "xpu": Capabilities(
            name="flash",
            dtypes=HALF,
            kv_cache_dtypes=HALF | FP8,
            kernel_block_multiple=64,
            head_size_multiple=8,
            max_head_size=512,
            # Its page stride must be a multiple of the token stride: K's row of heads in a run of bytes.
            layouts=("NHD", "cross_layer_NHD"),
            sliding_window=True,
            soft_cap=True,
            sinks=True,
        ),
    }
)
"""Per device type what its kernels share, so that a plan does not depend on which of them are installed."""


def default_providers() -> tuple[FlashProvider, ...]:
    """Every provider that comes with the package, in the order in which automatic choice tries them."""
    return (FlashAttention3(), FlashAttention4(), TorchVarlen(), XpuKernels(), IpexProvider(), TritonProvider())


class FlashBackend(AttentionBackend):
    """Paged flash kernels of whichever provider is installed.

    :param providers: best first; ``None`` takes the ones that come with the package.
    :param asked: the only one that may serve.
    :param latents: whether the engine has flash attend over latents; vLLM has other kernels for that.
    """

    name = "flash"

    def __init__(
        self, providers: Sequence[FlashProvider] | None = None, *, asked: str | None = None, latents: bool = False
    ) -> None:
        self.providers: tuple[FlashProvider, ...] = default_providers() if providers is None else tuple(providers)
        self.asked = asked
        self.latents = latents

    def configured(self, config: AttentionConfig, device: DeviceFacts) -> FlashBackend:
        """With a provider asked, this backend is that provider: what it cannot do, flash cannot do.

        :raises BackendError: for a provider that is not known, or not made for this type of device.
        """
        if config.flash_provider is None:
            return self
        self._require_known(config.flash_provider, device)
        return FlashBackend(self.providers, asked=config.flash_provider, latents=self.latents)

    def for_engine(self, engine: str) -> FlashBackend:
        """The embedded engine's latent attention is flash's, where a provider has it."""
        return FlashBackend(self.providers, asked=self.asked, latents=engine == "transformers")

    def capabilities(self, device: DeviceFacts) -> Capabilities:
        """The asked provider's; else what the platform's kernels share, or what the first provider there can do.

        Batch invariance is there where a provider has it, and so is latent attention for engines that ask flash for it.
        """
        if self.asked is None and device.device_type in POLICY:
            serving = [provider.constraints(device) for provider in self._serving(device)]
            return replace(
                POLICY[device.device_type],
                batch_invariant=any(can.batch_invariant for can in serving),
                mla=self.latents and any(can.mla for can in serving),
            )
        for provider in self._serving(device):
            return provider.constraints(device)
        return Capabilities(name=self.name, dtypes=frozenset(), kv_cache_dtypes=frozenset(), layouts=())

    def probe(self, device: DeviceFacts) -> Probe:
        """The first provider that loads; else what each one lacks and how to get it."""
        reasons = []
        for provider in self._serving(device):
            probe = self._standing(provider, device, self.asked)
            if probe.available:
                return Probe(available=True, reason=f"flash by {provider.name}: {probe.reason}")
            reasons.append(f"{provider.name}: {probe.reason}")
        return Probe(available=False, reason=self._nothing_serves(device, reasons))

    def declared_refusals(self, request: LayerRequest, device: DeviceFacts) -> tuple[str, ...]:
        """What the asked provider, or each where batch invariance narrows the choice, does not have for the layer.

        Else the platform's providers share what they serve, and :meth:`capabilities` says it.
        """
        if self.asked is None and not request.batch_invariant:
            return ()
        found: list[str] = []
        for provider in self._serving(device):
            lacking = layer_refusals(provider, request, device)
            if not lacking:
                return ()
            found += lacking
        return tuple(found)

    def refusals(self, request: LayerRequest, device: DeviceFacts) -> tuple[str, ...]:
        """Empty if a provider that loads here can serve the layer; else what each of them lacks for it."""
        found = []
        for provider in self._serving(device):
            if self._standing(provider, device, self.asked).available:
                lacking = layer_refusals(provider, request, device)
                if not lacking:
                    return ()
                found.append("; ".join(lacking))
        return (f"no flash provider that loads here can serve it: {'; '.join(found)}",) if found else ()

    def workspace(self, request: LayerRequest, device: DeviceFacts, limits: StepLimits) -> Workspace:
        """That of the provider which will be built; on a device that is only planned for, the largest of all."""
        found = (
            provider.workspace(request, device, limits)
            for provider in self._serving(device)
            if not layer_refusals(provider, request, device)
            and (not device.present or self._standing(provider, device, self.asked).available)
        )
        if device.present:
            return next(found, Workspace())
        return max(found, key=lambda one: total_bytes([one]), default=Workspace())

    def providers_on(self, device: DeviceFacts) -> tuple[ProviderFacts, ...]:
        """Each with its probe and its constraints."""
        facts = []
        for provider in self._serving(device):
            probe, passed = provider.probe(device), provider.only_when_asked(device)
            said = describe(provider.constraints(device))
            facts.append(
                ProviderFacts(
                    name=provider.name,
                    available=probe.available,
                    reason=probe.reason,
                    constraints=f"{said}; taken only when asked: {passed}" if passed else said,
                )
            )
        return tuple(facts)

    def build(self, request: BuildRequest) -> AttentionImpl:
        """The first provider that loads and can serve the request; with one asked, that one or none.

        :raises BackendError: when none can, with every provider's reasons and what to install.
        """
        asked = request.config.flash_provider or self.asked
        if asked is not None:
            self._require_known(asked, request.device)
        reasons = []
        for provider in self._serving(request.device, asked):
            probe = self._standing(provider, request.device, asked)
            if not probe.available:
                reasons.append(f"{provider.name}: {probe.reason}")
                continue
            lacking = build_refusals(provider, request)
            if lacking:
                reasons.append(f"{provider.name}: {'; '.join(lacking)}")
                continue
            try:
                return provider.build(request)
            except BackendError as error:
                reasons.append(f"{provider.name}: {error.message}")
        raise BackendError(
            self._nothing_serves(request.device, reasons),
            option="backend" if asked is None else "flash_provider",
            value=asked or self.name,
            expected="a provider of flash kernels for this device",
        )

    def _serving(self, device: DeviceFacts, asked: str | None = None) -> list[FlashProvider]:
        only = asked or self.asked
        return [
            provider
            for provider in self.providers
            if device.device_type in provider.device_types and only in (None, provider.name)
        ]

    def _standing(self, provider: FlashProvider, device: DeviceFacts, asked: str | None) -> Probe:
        """The provider's probe; automatic choice adds that it passes over it."""
        probe = provider.probe(device)
        passed = provider.only_when_asked(device) if asked is None else None
        if not probe.available or passed is None:
            return probe
        return Probe(available=False, reason=f"{probe.reason}, but is taken only when asked: {passed}")

    def _require_known(self, asked: str, device: DeviceFacts) -> None:
        """The asked provider is one of ours and answers for this type of device, or this raises."""
        known = {provider.name: provider for provider in self.providers}
        here = [name for name, provider in known.items() if device.device_type in provider.device_types]
        if asked in here:
            return
        listed = ", ".join(here) or "none"
        said = f"flash_provider {asked!r} is not known"
        if asked in known:
            types = ", ".join(sorted(known[asked].device_types))
            said = f"flash_provider {asked!r} serves {types}, and this device is {device.device_type}"
        raise BackendError(
            f"{said}; for {device.device_type} there are {listed}",
            option="flash_provider",
            value=asked,
            expected=here,
        )

    def _nothing_serves(self, device: DeviceFacts, reasons: Sequence[str]) -> str:
        """The sentence of a refusal, with all that was tried."""
        tried = "; ".join(reasons) if reasons else "no provider for this device type is registered"
        same = device.platform == device.device_type
        where = device.platform if same else f"{device.platform} ({device.device_type})"
        return f"flash has no provider that serves {where}: {tried}"
