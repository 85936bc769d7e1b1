"""What is here: software, plugins, platforms and backends, each with what its probe says. Needs no torch."""

from __future__ import annotations

import platform as operating_system
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from ..attention_backends.interface import Probe, ProviderFacts
from ..device import DeviceFacts
from ..errors import MakereadyError
from ..platforms.interface import Platform
from ..platforms.known import plannable_platforms
from ..platforms.provider import PlatformProvider, PluginProblem, ProbeResult, describe_exception
from ..platforms.selection import WHEELS, auto_order, install_command, run_probe, select_platform
from ..platforms.software import (
    IPEX,
    TRITON_PACKAGES,
    XPU_KERNELS,
    installed_version,
    installed_versions,
    ipex_clash,
    triton_clash,
)
from .manager import Plugins
from .records import OfferedBackend, OfferedMixer, PluginInfo

SOFTWARE: tuple[str, ...] = ("torch", "transformers", "safetensors", "flash-attn", "flash-attn-3", "flash-attn-4")
"""Distributions that are shown also when they are not installed; triton's and Intel's are added."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendReport:
    """One attention backend, or one set of mixer kernels, on one platform."""

    name: str
    plugin: str
    distribution: str
    available: bool
    reason: str
    providers: tuple[ProviderFacts, ...] = ()
    """Libraries that could bring its kernels, best first; empty for a backend that brings its own."""

    def to_dict(self) -> dict[str, object]:
        """The backend as JSON-ready values."""
        return {
            "name": self.name,
            "plugin": self.plugin,
            "distribution": self.distribution,
            "available": self.available,
            "reason": self.reason,
            "providers": [provider.to_dict() for provider in self.providers],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformReport:
    """One platform: its probe, auto's verdict, and the backends that plugins offer for it."""

    name: str
    distribution: str | None
    """The wheel that provides it; ``None`` if it can only be planned for."""
    probe: ProbeResult
    chosen: bool
    """Whether auto takes it."""
    verdict: str
    """Why auto takes or refuses it."""
    backends: tuple[BackendReport, ...] = ()
    mixers: tuple[BackendReport, ...] = ()
    """Kernels of state layers."""

    def to_dict(self) -> dict[str, object]:
        """The platform as JSON-ready values."""
        return {
            "name": self.name,
            "distribution": self.distribution,
            "available": self.probe.available,
            "reason": self.probe.reason,
            "probe": self.probe.to_dict(),
            "chosen": self.chosen,
            "verdict": self.verdict,
            "backends": [backend.to_dict() for backend in self.backends],
            "mixers": [backend.to_dict() for backend in self.mixers],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorReport:
    """Everything that ``makeready doctor`` shows."""

    makeready: str
    python: str
    executable: str
    system: str
    software: tuple[tuple[str, str | None], ...]
    """(distribution, version); the version is ``None`` where it is not installed."""
    notes: tuple[str, ...]
    """What is wrong with the software: packages that overwrite each other, versions that do not load."""
    plugins: tuple[PluginInfo, ...]
    problems: tuple[PluginProblem, ...]
    disabled: tuple[str, ...]
    platforms: tuple[PlatformReport, ...]
    """In auto's order; platforms that can only be planned for come last."""
    auto: str | None
    """The platform that auto chooses, or ``None`` if it refuses to choose."""
    auto_reason: str

    def to_dict(self) -> dict[str, object]:
        """The report as JSON-ready values."""
        return {
            "makeready": self.makeready,
            "python": self.python,
            "executable": self.executable,
            "system": self.system,
            "software": dict(self.software),
            "notes": list(self.notes),
            "plugins": [plugin.to_dict() for plugin in self.plugins],
            "problems": [problem.to_dict() for problem in self.problems],
            "disabled": list(self.disabled),
            "platforms": [platform.to_dict() for platform in self.platforms],
            "auto": self.auto,
            "auto_reason": self.auto_reason,
        }


def examine(plugins: Plugins) -> DoctorReport:
    """Probe every platform and every backend that plugins brought. Nothing that is found raises."""
    probes, probe_problems = _probe_all(plugins.providers)
    auto, auto_reason, verdicts = _auto(plugins, probes, probe_problems)
    platforms: list[PlatformReport] = []
    backend_problems: list[PluginProblem] = []
    for provider in auto_order(plugins.providers):
        probe = probes[provider.name]
        device = probe.devices[0] if probe.devices else _planned_device(provider.platform)
        backends, mixers, problems = _backends(plugins, device)
        backend_problems += problems
        platforms.append(
            PlatformReport(
                name=provider.name,
                distribution=provider.distribution,
                probe=probe,
                chosen=provider.name == auto,
                verdict=verdicts.get(provider.name, probe.reason),
                backends=backends,
                mixers=mixers,
            )
        )
    return DoctorReport(
        makeready=installed_version("makeready") or "not installed: run from its source tree",
        python=operating_system.python_version(),
        executable=sys.executable,
        system=operating_system.platform(),
        software=_software(),
        notes=tuple(note for note in (triton_clash(), ipex_clash()) if note),
        plugins=plugins.infos,
        problems=tuple(dict.fromkeys((*plugins.problems, *probe_problems, *backend_problems))),
        disabled=plugins.disabled,
        platforms=(*platforms, *_only_planned(plugins, probes)),
        auto=auto,
        auto_reason=auto_reason,
    )


def _probe_all(
    providers: Sequence[PlatformProvider],
) -> tuple[dict[str, ProbeResult], tuple[PluginProblem, ...]]:
    """What each platform's probe says; one that breaks its contract is a refusal here and a problem too."""
    probes, problems = {}, []
    for provider in providers:
        try:
            probes[provider.name] = run_probe(provider)
        except MakereadyError as error:
            probes[provider.name] = ProbeResult(available=False, reason=error.message)
            problems.append(
                PluginProblem(
                    name=provider.name,
                    distribution=provider.distribution,
                    version=installed_version(provider.distribution) or "unknown",
                    stage="probe",
                    exception=error.message,
                )
            )
    return probes, tuple(problems)


def _auto(
    plugins: Plugins, probes: dict[str, ProbeResult], probe_problems: Sequence[PluginProblem]
) -> tuple[str | None, str, dict[str, str]]:
    """Auto's choice, its reason, and the verdict on each platform; every probe was asked once and repeats itself."""
    probed = [replace(given, probe=partial(probes.__getitem__, given.name)) for given in plugins.providers]
    try:
        selection = select_platform(probed, None, (*plugins.problems, *probe_problems))
    except MakereadyError as error:
        return None, error.message, {}
    verdicts = {candidate.name: candidate.reason for candidate in selection.candidates}
    return selection.provider.name, selection.reason, verdicts


def _backends(
    plugins: Plugins, device: DeviceFacts
) -> tuple[tuple[BackendReport, ...], tuple[BackendReport, ...], tuple[PluginProblem, ...]]:
    """Attention backends, kernels of state layers, and plugins that could not name theirs."""
    offers = plugins.attention_backends(device)
    mixers = plugins.mixer_backends(device)
    return (
        tuple(_backend(offer, device) for offer in offers.offered),
        tuple(_mixer(offer, device) for offer in mixers.offered),
        (*offers.problems, *mixers.problems),
    )


def _mixer(offer: OfferedMixer, device: DeviceFacts) -> BackendReport:
    """As for attention, and not available where the kernels have nothing for the device."""
    report = _backend(offer, device)
    if report.available and not offer.backend.capabilities(device).dtypes:
        reason = f"{report.name} has no kernels for {device.platform}"
        return replace(report, available=False, reason=reason)
    return report


def _backend(offer: OfferedBackend | OfferedMixer, device: DeviceFacts) -> BackendReport:
    providers: tuple[ProviderFacts, ...] = ()
    try:
        probe = offer.backend.probe(device)
        if isinstance(offer, OfferedBackend):
            providers = offer.backend.providers_on(device)
    except Exception as error:  # a vendor's probe that breaks its contract is shown, it does not end the report
        probe = Probe(available=False, reason=f"its probe raised {describe_exception(error)}, which it must not")
    return BackendReport(
        name=offer.backend.name,
        plugin=offer.plugin,
        distribution=offer.distribution,
        available=probe.available,
        reason=probe.reason,
        providers=providers,
    )


def _planned_device(platform: Platform) -> DeviceFacts:
    return DeviceFacts(platform=platform.name, device_type=platform.device_type, present=False)


def _only_planned(plugins: Plugins, probes: dict[str, ProbeResult]) -> Sequence[PlatformReport]:
    """Platforms that the package plans for and whose wheel is not installed."""
    reports, platforms = [], plannable_platforms(plugins.providers)
    for name in WHEELS:
        if name not in probes:
            broken = next((problem for problem in plugins.problems if problem.may_provide(name)), None)
            reason = f"{name} can be planned for; to run on it: {install_command(name)}"
            if broken is not None:
                reason = f"{name} can be planned for; its wheel is installed and broken: {broken.exception}"
            backends, mixers, _ = _backends(plugins, _planned_device(platforms[name]))
            reports.append(
                PlatformReport(
                    name=name,
                    distribution=None,
                    probe=ProbeResult(available=False, reason=reason),
                    chosen=False,
                    verdict=reason,
                    backends=backends,
                    mixers=mixers,
                )
            )
    return reports


def _software() -> tuple[tuple[str, str | None], ...]:
    shown = [(name, installed_version(name)) for name in (*SOFTWARE, IPEX, XPU_KERNELS)]
    return (*shown, *(installed_versions(*TRITON_PACKAGES) or (("triton", None),)))
