"""Two plugins that bring the same name: what comes with the package keeps it, else neither gets it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from ..platforms.provider import PluginProblem


class Owner(Protocol):
    """A plugin as far as this file needs it: a source or what was let in."""

    @property
    def name(self) -> str:
        """The entry point's name."""

    @property
    def distribution(self) -> str:
        """The wheel."""

    @property
    def version(self) -> str:
        """The wheel's version."""

    @property
    def builtin(self) -> bool:
        """Whether it comes with the package."""

    def problem(self, stage: str, exception: str) -> PluginProblem:
        """What is wrong with it."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A plugin brings something under a name."""

    owner: Owner
    what: str


def repeated(claims: Iterable[Claim], kind: str) -> tuple[PluginProblem, ...]:
    """A problem for every plugin that brings a name that another one has too; each names both.

    Choosing one of them would be a guess that changes with the order of installation.
    """
    by_name: dict[str, list[Owner]] = defaultdict(list)
    for claim in claims:
        by_name[claim.what].append(claim.owner)
    problems = []
    for what, owners in by_name.items():
        for owner in owners:
            others = [other for other in owners if other is not owner]
            if others and not owner.builtin:
                rivals = " and ".join(f"{o.name!r} ({o.distribution} {o.version})" for o in others)
                problems.append(
                    owner.problem("result", f"the {kind} {what!r} is also brought by plugin {rivals}; uninstall one")
                )
    return tuple(problems)
