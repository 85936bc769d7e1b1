"""What comes with the package enters by the door that outsiders use."""

from __future__ import annotations

from ..attention_backends.flash import FlashBackend
from ..attention_backends.flex import FlexBackend
from ..attention_backends.interface import AttentionBackend
from ..attention_backends.reference import ReferenceBackend
from ..device import DeviceFacts
from ..hybrid.mixers.backend import MixerBackend
from ..hybrid.mixers.libraries import CausalConv1dBackend, FlaBackend, MambaSsmBackend
from ..hybrid.mixers.reference import ReferenceMixerBackend
from ..hybrid.mixers.triton import TritonMixerBackend
from ..platforms.cpu import CPU
from ..platforms.probing import probe_cpu
from ..platforms.provider import PlatformProvider
from .hookspecs import hookimpl


class CpuPlugin:
    """The cpu platform."""

    @hookimpl
    def makeready_platforms(self) -> tuple[PlatformProvider, ...]:
        """This machine's CPU."""
        return (PlatformProvider(name="cpu", platform=CPU, probe=probe_cpu, distribution="makeready"),)


class BackendPlugin:
    """One attention backend, offered on every device; its capabilities say what it can do there."""

    def __init__(self, backend: AttentionBackend) -> None:
        self._backend = backend

    @hookimpl
    def makeready_attention_backends(self, device: DeviceFacts) -> tuple[AttentionBackend, ...]:
        """The backend."""
        return (self._backend,)


class MixerPlugin:
    """The package's kernels for state layers."""

    @hookimpl
    def makeready_mixer_backends(self, device: DeviceFacts) -> tuple[MixerBackend, ...]:
        """Triton's, those of libraries, and the reference."""
        return (
            TritonMixerBackend(),
            FlaBackend(),
            MambaSsmBackend(),
            CausalConv1dBackend(),
            ReferenceMixerBackend(),
        )


def builtin_plugins() -> tuple[tuple[str, object], ...]:
    """The package's own plugins, as (name, instance)."""
    return (
        ("cpu", CpuPlugin()),
        ("flash", BackendPlugin(FlashBackend())),
        ("flex", BackendPlugin(FlexBackend())),
        ("reference", BackendPlugin(ReferenceBackend())),
        ("mixers", MixerPlugin()),
    )
