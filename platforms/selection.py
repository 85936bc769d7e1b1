"""Which platform runs: the one asked for, or the best whose probe succeeded. Every candidate keeps its reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..device import DeviceFacts
from ..errors import MakereadyError, PlatformError, PluginError
from .provider import PlatformProvider, PluginProblem, ProbeResult, describe_exception, device_to_dict

AUTO_ORDER: tuple[str, ...] = ("xpu", "cuda")
"""Accelerators that are tried first; then vendors' by name; ``cpu`` comes last."""

WHEELS: Mapping[str, str] = {"cuda": "makeready-cuda", "xpu": "makeready-xpu"}
"""Platforms that the package plans for and a wheel of ours runs."""


def install_command(platform: str) -> str:
    """How to get the wheel of a platform in :data:`WHEELS`: it is not on PyPI, the repository has it."""
    return f"pip install ./plugins/wheels/{WHEELS[platform]}, in a clone of makeready's repository"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One platform as the selection saw it."""

    name: str
    distribution: str
    probe: ProbeResult | None
    """``None`` if it was not probed: something else was asked for, or the probe raised."""
    chosen: bool
    reason: str
    """Why it was chosen or refused."""

    def to_dict(self) -> dict[str, object]:
        """The candidate as JSON-ready values."""
        return {
            "name": self.name,
            "distribution": self.distribution,
            "chosen": self.chosen,
            "reason": self.reason,
            "probe": self.probe.to_dict() if self.probe else None,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformSelection:
    """The platform that runs, its device, and what became of every other candidate."""

    provider: PlatformProvider
    device: DeviceFacts
    reason: str
    candidates: tuple[Candidate, ...]
    problems: tuple[PluginProblem, ...] = ()
    """Broken plugins that were there; they did not decide, since the platform was asked for by name."""

    def to_dict(self) -> dict[str, object]:
        """The selection as JSON-ready values."""
        return {
            "platform": self.provider.name,
            "distribution": self.provider.distribution,
            "device": device_to_dict(self.device),
            "reason": self.reason,
            "candidates": [candidate.to_dict() for candidate in self.candidates],
            "problems": [problem.to_dict() for problem in self.problems],
        }


def select_platform(
    providers: Sequence[PlatformProvider],
    asked: str | None,
    problems: Sequence[PluginProblem] = (),
    *,
    device_index: int = 0,
    disabled: Sequence[str] = (),
) -> PlatformSelection:
    """The platform to run on.

    A platform that is asked for is taken or refused, and nothing else is probed. Without one, the first in auto
    order whose probe succeeds is taken: a broken plugin then is an error, since it might have been the one.

    :param asked: the platform's name, or ``None`` for auto.
    :param problems: plugins that were found but cannot be used.
    :param disabled: entry points that ``MAKEREADY_DISABLE_PLUGINS`` leaves out, for the error's sentence.
    :raises PlatformError: not known, its wheel not installed, its probe refused it, or no such device.
    :raises PluginError: only a broken plugin would provide it, or auto was asked beside a broken plugin.
    """
    if asked is not None:
        return _select_asked(providers, asked, problems, device_index, disabled)
    if problems:
        raise _broken_auto(providers, problems)
    return _select_auto(providers, device_index)


def auto_order(providers: Sequence[PlatformProvider]) -> tuple[PlatformProvider, ...]:
    """The providers as auto tries them: xpu, cuda, vendors' by name, then cpu."""

    def rank(provider: PlatformProvider) -> tuple[int, str]:
        if provider.name == "cpu":
            return (len(AUTO_ORDER) + 1, "")
        known = AUTO_ORDER.index(provider.name) if provider.name in AUTO_ORDER else len(AUTO_ORDER)
        return (known, provider.name)

    return tuple(sorted(providers, key=rank))


def run_probe(provider: PlatformProvider) -> ProbeResult:
    """Call a provider's probe and check what it answers.

    :raises PluginError: when a plugin's probe raises or answers something else, which it must not.
    """
    try:
        result = provider.probe()
    except (Exception, SystemExit) as error:
        raise _probe_error(provider, f"raised {describe_exception(error)}") from error
    if not isinstance(result, ProbeResult):
        raise _probe_error(provider, f"returned {type(result).__name__}, expected ProbeResult")
    if result.available and not result.devices:
        raise _probe_error(provider, "says that it is available but names no device")
    return result


def _select_asked(
    providers: Sequence[PlatformProvider],
    asked: str,
    problems: Sequence[PluginProblem],
    device_index: int,
    disabled: Sequence[str],
) -> PlatformSelection:
    provider = next((given for given in providers if given.name == asked), None)
    if provider is None:
        raise _not_provided(providers, asked, problems, disabled)
    probe = run_probe(provider)
    if not probe.available:
        raise PlatformError(
            f"platform {asked!r} was asked for but its probe refused it: {probe.reason}",
            option="platform",
            value=asked,
            expected="a platform whose device is here (see makeready doctor)",
        )
    device = _device(provider, probe, device_index)
    refusal = provider.platform.refusal(device)
    if refusal is not None:
        raise PlatformError(
            f"platform {asked!r} was asked for but cannot serve its device {device_index}: {refusal}",
            option="platform",
            value=asked,
            expected="a device that the platform serves (see makeready doctor)",
        )
    reason = f"{asked} was asked for; {probe.reason}"
    candidates = tuple(
        Candidate(
            name=given.name,
            distribution=given.distribution,
            probe=probe if given is provider else None,
            chosen=given is provider,
            reason=reason if given is provider else f"not tried: {asked} was asked for",
        )
        for given in auto_order(providers)
    )
    return PlatformSelection(
        provider=provider, device=device, reason=reason, candidates=candidates, problems=tuple(problems)
    )


def _select_auto(providers: Sequence[PlatformProvider], device_index: int) -> PlatformSelection:
    chosen: tuple[PlatformProvider, DeviceFacts, str] | None = None
    candidates = []
    for provider in auto_order(providers):
        probe = run_probe(provider)
        refusal = _refusal(provider, probe, device_index)
        if refusal is not None:
            reason = refusal
        elif chosen is not None:
            reason = f"usable, but {chosen[0].name} comes first in auto's order; --platform {provider.name} takes it"
        else:
            reason = f"the first in auto's order whose probe succeeded; {probe.reason}"
            chosen = (provider, _device(provider, probe, device_index), reason)
        candidates.append(
            Candidate(
                name=provider.name,
                distribution=provider.distribution,
                probe=probe,
                chosen=chosen is not None and chosen[0] is provider,
                reason=reason,
            )
        )
    if chosen is None:
        said = "; ".join(f"{candidate.name}: {candidate.reason}" for candidate in candidates) or "none is installed"
        raise PlatformError(f"no platform can run here: {said}", option="platform", value="auto")
    provider, device, reason = chosen
    return PlatformSelection(provider=provider, device=device, reason=reason, candidates=tuple(candidates))


def _refusal(provider: PlatformProvider, probe: ProbeResult, device_index: int) -> str | None:
    """Why the platform cannot run here: no device, or one that it does not serve."""
    if not probe.available:
        return probe.reason
    return provider.platform.refusal(_device(provider, probe, device_index))


def _device(provider: PlatformProvider, probe: ProbeResult, index: int) -> DeviceFacts:
    found = next((device for device in probe.devices if device.index == index), None)
    if found is None:
        have = [device.index for device in probe.devices]
        raise PlatformError(
            f"device_index {index} is not there: platform {provider.name!r} has "
            f"{len(have)} device{'s' if len(have) != 1 else ''}, index {', '.join(map(str, have))}",
            option="device_index",
            value=index,
            expected=have,
        )
    return found


def _not_provided(
    providers: Sequence[PlatformProvider],
    asked: str,
    problems: Sequence[PluginProblem],
    disabled: Sequence[str],
) -> MakereadyError:
    """Why nobody provides ``asked``: its plugin is broken, left out, not installed, or there is no such name."""
    names = [provider.name for provider in auto_order(providers)]
    broken = [problem for problem in problems if problem.may_provide(asked)]
    if broken:
        return PluginError(
            f"platform {asked!r} was asked for, but {'; '.join(problem.sentence() for problem in broken)}",
            option="platform",
            value=asked,
            expected="repair or reinstall the plugin; " + _choose_from(names),
        )
    if asked in disabled:
        return PlatformError(
            f"platform {asked!r} was asked for, but MAKEREADY_DISABLE_PLUGINS leaves its plugin out",
            option="platform",
            value=asked,
            expected=f"MAKEREADY_DISABLE_PLUGINS without {asked}; " + _choose_from(names),
        )
    if asked in WHEELS:
        return PlatformError(
            f"platform {asked!r} can be planned for here, but to run on it install its wheel: "
            f"{install_command(asked)}",
            option="platform",
            value=asked,
            expected=_choose_from(names),
        )
    also = "".join(f"; {problem.sentence()}" for problem in problems)
    return PlatformError(
        f"platform {asked!r} is not known; installed are {', '.join(names) or 'none'}{also}",
        option="platform",
        value=asked,
        expected=names,
    )


def _choose_from(names: Sequence[str]) -> str:
    return f"or choose from {', '.join(names)}"


def _broken_auto(providers: Sequence[PlatformProvider], problems: Sequence[PluginProblem]) -> PluginError:
    """Auto does not choose past a broken plugin: it might have been the platform that was meant."""
    names = ",".join(dict.fromkeys(problem.name for problem in problems))
    choices = " or ".join(f"--platform {provider.name}" for provider in auto_order(providers))
    return PluginError(
        f"{'; '.join(problem.sentence() for problem in problems)}. The platform is not chosen past a broken plugin: "
        f"repair or uninstall it, leave it out with MAKEREADY_DISABLE_PLUGINS={names}, or name the platform: {choices}",
        option="platform",
        value="auto",
        expected=choices,
    )


def _probe_error(provider: PlatformProvider, what: str) -> PluginError:
    return PluginError(
        f"the probe of platform {provider.name!r} ({provider.distribution}) {what}; a probe must answer a "
        f"ProbeResult and never raise",
        option="platform",
        value=provider.name,
    )
