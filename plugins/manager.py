"""Finds plugins, lets in those that fit, and keeps every one that does not by name. No state between calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, TypeVar

import pluggy

from ..attention_backends.interface import AttentionBackend
from ..cache.block_size import Constraint
from ..device import DeviceFacts
from ..errors import PluginError
from ..hybrid.mixers.backend import MixerBackend
from ..platforms.decision import BlockSizeRequest
from ..platforms.provider import PlatformProvider, PluginProblem
from . import calling, verification
from .builtin import builtin_plugins
from .discovery import Found, Source, disabled_names, found_entry_points, loaded
from .records import (
    BackendOffers,
    KVConnectorProvider,
    MixerOffers,
    OfferedBackend,
    OfferedMixer,
    PluginInfo,
    StartupNote,
)
from .uniqueness import Claim, repeated

if TYPE_CHECKING:
    from ..platforms.ready import Ready

B = TypeVar("B", bound=AttentionBackend | MixerBackend)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugins:
    """The plugins of one :func:`load_plugins`: nothing can be added to it."""

    infos: tuple[PluginInfo, ...]
    """Plugins that were let in, builtin ones first, then by name."""
    providers: tuple[PlatformProvider, ...]
    """Platforms that can run here, if their probe says so."""
    connectors: tuple[KVConnectorProvider, ...]
    problems: tuple[PluginProblem, ...]
    """Plugins that were found but cannot be used."""
    disabled: tuple[str, ...]
    """Entry points that were found and left out, as asked."""
    manager: pluggy.PluginManager = field(repr=False, compare=False)

    def attention_backends(self, device: DeviceFacts) -> BackendOffers:
        """Every plugin's attention backends for ``device``, and who brought them.

        A plugin whose hook fails is a problem of the offers, and so is one that brings a name that another has.
        """
        found, problems = self._offered(
            "makeready_attention_backends", verification.checked_backends, device, "attention backend"
        )
        offered = (OfferedBackend(backend=x, plugin=info.name, distribution=info.distribution) for info, x in found)
        return BackendOffers(offered=tuple(offered), problems=problems)

    def mixer_backends(self, device: DeviceFacts) -> MixerOffers:
        """Every plugin's kernels of state layers for ``device``, with the same rules."""
        found, problems = self._offered(
            "makeready_mixer_backends", verification.checked_mixers, device, "mixer backend"
        )
        offered = (OfferedMixer(backend=x, plugin=info.name, distribution=info.distribution) for info, x in found)
        return MixerOffers(offered=tuple(offered), problems=problems)

    def _offered(
        self, hook: str, check: Callable[[object], tuple[B, ...]], device: DeviceFacts, kind: str
    ) -> tuple[list[tuple[PluginInfo, B]], tuple[PluginProblem, ...]]:
        """What plugins answer to ``hook``, with who brought it, and the plugins that are left out."""
        gathered = calling.gather(self.manager, self.infos, hook, check, {"device": device})
        found = [(info, backend) for info, backends in gathered.answers for backend in backends]
        rivals = repeated([Claim(info, backend.name) for info, backend in found], kind)
        refused = {problem.name for problem in rivals}
        kept = [(info, backend) for info, backend in found if info.name not in refused]
        return kept, (*gathered.problems, *rivals)

    def block_size_constraints(self, request: BlockSizeRequest) -> tuple[Constraint, ...]:
        """What plugins ask of the block size.

        :raises PluginError: when one fails: without its constraint the block size could be wrong.
        """
        gathered = calling.gather(
            self.manager,
            self.infos,
            "makeready_block_size_constraints",
            verification.checked_constraints,
            {"request": request},
        )
        _raise_first(gathered.problems)
        return tuple(constraint for _, constraints in gathered.answers for constraint in constraints)

    def engine_startup(self, ready: Ready) -> tuple[StartupNote, ...]:
        """Tell every plugin that an engine is ready to run; what they have to say about it.

        :raises PluginError: when one fails.
        """
        gathered = calling.gather(
            self.manager,
            self.infos,
            "makeready_engine_startup",
            verification.checked_note,
            {"ready": ready},
            optional=True,
        )
        _raise_first(gathered.problems)
        return tuple(StartupNote(plugin=info.name, text=text) for info, text in gathered.answers)


def load_plugins(
    *,
    entry_points: Iterable[EntryPoint] | None = None,
    disabled: str | None = None,
    extra: Iterable[tuple[str, object]] = (),
) -> Plugins:
    """Load the builtin plugins, then every installed wheel's, one at a time, so that none sinks the others.

    :param entry_points: what to load instead of the installed group ``makeready``.
    :param disabled: entry points to leave out, separated by commas, or ``all``; ``None`` reads the environment
        variable ``MAKEREADY_DISABLE_PLUGINS``.
    :param extra: plugins of the calling process itself, as (name, module or instance).
    """
    left_out = disabled_names(disabled)
    installed = found_entry_points(entry_points)
    kept = [found for found in installed if not left_out & {found.source.name, "all"}]
    manager, infos, problems = _register(
        [
            *(_at_hand(Source.own(name), plugin) for name, plugin in builtin_plugins()),
            *kept,
            *(_at_hand(Source.of_process(name), plugin) for name, plugin in extra),
        ]
    )
    disabled_found = tuple(found.source.name for found in installed if found not in kept)
    return _collect(manager, infos, problems, disabled_found)


def _at_hand(source: Source, plugin: object) -> Found:
    return Found(source=source, load=lambda: plugin)


def _register(
    everyone: Sequence[Found],
) -> tuple[pluggy.PluginManager, list[PluginInfo], list[PluginProblem]]:
    """Load and check each plugin by itself; those that pass are registered, the others become problems."""
    manager = verification.new_manager()
    infos: list[PluginInfo] = []
    problems = list(repeated([Claim(found.source, found.source.name) for found in everyone], "entry point"))
    ambiguous = {problem.name for problem in problems}
    for found in everyone:
        source = found.source
        if source.name in ambiguous and not source.builtin:
            continue
        plugin = loaded(found)
        if isinstance(plugin, PluginProblem):
            problems.append(plugin)
            continue
        try:
            hooks = verification.check_plugin(plugin, source.name)
            manager.register(plugin, source.name)
        except (verification.Refused, ValueError) as refused:  # ValueError: one object under two names
            problems.append(source.problem("register", str(refused)))
            continue
        infos.append(source.info(hooks))
    return manager, infos, problems


def _collect(
    manager: pluggy.PluginManager,
    infos: list[PluginInfo],
    problems: list[PluginProblem],
    disabled: tuple[str, ...],
) -> Plugins:
    """Ask once for what does not depend on a device, and leave out every plugin that answered wrongly."""
    platforms = calling.gather(manager, infos, "makeready_platforms", verification.checked_platforms, {})
    connectors = calling.gather(manager, infos, "makeready_kv_connectors", verification.checked_connectors, {})
    platform_claims = [Claim(info, given.name) for info, answer in platforms.answers for given in answer]
    connector_claims = [Claim(info, given.name) for info, answer in connectors.answers for given in answer]
    problems = [
        *problems,
        *platforms.problems,
        *connectors.problems,
        *repeated(platform_claims, "platform"),
        *repeated(connector_claims, "KV connector"),
    ]
    refused = {problem.name for problem in problems}
    kept = [info for info in infos if info.name not in refused or info.builtin]
    for info in infos:
        if info not in kept:
            manager.unregister(name=info.name)
    return Plugins(
        infos=tuple(kept),
        providers=tuple(given for info, answer in platforms.answers if info in kept for given in answer),
        connectors=tuple(given for info, answer in connectors.answers if info in kept for given in answer),
        problems=tuple(problems),
        disabled=disabled,
        manager=manager,
    )


def _raise_first(problems: tuple[PluginProblem, ...]) -> None:
    if problems:
        raise PluginError(
            "; ".join(problem.sentence() for problem in problems),
            option="plugin",
            value=problems[0].name,
            expected=f"repair it, or leave it out with MAKEREADY_DISABLE_PLUGINS={problems[0].name}",
        )
