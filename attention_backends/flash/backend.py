"""What flash attention declares on each platform, and the choice of a provider. No torch here."""

from __future__ import annotations

from collections.abc import Sequence

from ...config import LAYOUTS
from ...device import DeviceFacts
from ...errors import BackendError
from ..interface import AttentionBackend, AttentionImpl, BuildRequest, Capabilities, Probe
from .ipex import IpexProvider
from .providers import LIBRARIES, FlashProvider, missing

HALF = frozenset({"bfloat16", "float16"})
FP8 = frozenset({"fp8_e4m3", "fp8_e5m2"})


class FlashBackend(AttentionBackend):
    """Paged flash kernels of whichever provider is installed.

    :param providers: best first; ``None`` takes the ones that come with the package.
    """

    name = "flash"

    def __init__(self, providers: Sequence[FlashProvider] | None = None) -> None:
        self.providers: tuple[FlashProvider, ...] = (IpexProvider(),) if providers is None else tuple(providers)

    def capabilities(self, device: DeviceFacts) -> Capabilities:
        """What the platform's kernels share; elsewhere what the first provider for the device type can do."""
        if device.device_type == "cuda":
            return Capabilities(
                name=self.name,
                dtypes=HALF,
                kv_cache_dtypes=HALF | FP8,
                kernel_block_multiple=16,
                head_size_multiple=8,
                max_head_size=256,
                layouts=LAYOUTS,
                sliding_window=True,
                soft_cap=True,
                sinks=True,
            )
        if device.device_type == "xpu":
            return Capabilities(
                name=self.name,
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
            )
        for provider in self._serving(device):
            return provider.constraints(device)
        return Capabilities(name=self.name, dtypes=frozenset(), kv_cache_dtypes=frozenset(), layouts=())

    def probe(self, device: DeviceFacts) -> Probe:
        """The first provider that loads; else what each one lacks and which libraries would help."""
        reasons = []
        for provider in self._serving(device):
            probe = provider.probe(device)
            if probe.available:
                return Probe(available=True, reason=f"flash by {provider.name}: {probe.reason}")
            reasons.append(f"{provider.name}: {probe.reason}")
        return Probe(available=False, reason=self._nothing_serves(device, reasons))

    def build(self, request: BuildRequest) -> AttentionImpl:
        """The first provider that loads and can serve the request.

        :raises BackendError: when none can, with every provider's reasons and what to install.
        """
        reasons = []
        for provider in self._serving(request.device):
            probe = provider.probe(request.device)
            if not probe.available:
                reasons.append(f"{provider.name}: {probe.reason}")
                continue
            try:
                return provider.build(request)
            except BackendError as error:
                reasons.append(f"{provider.name}: {error.message}")
        raise BackendError(
            self._nothing_serves(request.device, reasons),
            option="backend",
            value=self.name,
            expected="a provider of flash kernels for this device",
        )

    def _serving(self, device: DeviceFacts) -> list[FlashProvider]:
        return [provider for provider in self.providers if device.device_type in provider.device_types]

    def _nothing_serves(self, device: DeviceFacts, reasons: Sequence[str]) -> str:
        """The sentence of a refusal, with all that was tried and what else there is."""
        tried = "; ".join(reasons) if reasons else "no provider for this device type is registered"
        spoken_for = {provider.module for provider in self.providers}
        libraries = missing(device, [library for library in LIBRARIES if library.module not in spoken_for])
        seen = f" (libraries: {libraries})" if libraries else ""
        same = device.platform == device.device_type
        where = device.platform if same else f"{device.platform} ({device.device_type})"
        return f"flash has no provider that serves {where}: {tried}{seen}"
