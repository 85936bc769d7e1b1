"""Calls one hook of every plugin, each by itself, so that an answer and a failure have a name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import pluggy

from ..platforms.provider import PluginProblem, describe_exception
from .records import PluginInfo
from .verification import Refused

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered(Generic[T]):
    """What plugins answered, in the order they were registered, and which of them failed."""

    answers: tuple[tuple[PluginInfo, T], ...]
    problems: tuple[PluginProblem, ...]


def gather(
    manager: pluggy.PluginManager,
    infos: Sequence[PluginInfo],
    hook: str,
    check: Callable[[object], T],
    arguments: Mapping[str, Any],
    *,
    optional: bool = False,
) -> Gathered[T]:
    """Ask every plugin that implements ``hook``.

    :param check: turns an answer into the value that is used, or raises :class:`Refused`.
    :param optional: ``None`` is a good answer and counts as nothing.
    """
    answers: list[tuple[PluginInfo, T]] = []
    problems: list[PluginProblem] = []
    for info in infos:
        if hook not in info.hooks:
            continue
        others = [plugin for name, plugin in manager.list_name_plugin() if name != info.name]
        try:
            given = manager.subset_hook_caller(hook, others)(**arguments)
        except (Exception, SystemExit) as error:
            problems.append(info.problem("call", f"{hook}: {describe_exception(error)}"))
            continue
        answer = given[0] if given else None  # pluggy drops None
        if answer is None and optional:
            continue
        try:
            answers.append((info, check(answer)))
        except Refused as refused:
            problems.append(info.problem("result", str(refused)))
    return Gathered(answers=tuple(answers), problems=tuple(problems))
