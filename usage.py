"""What is wrong with a command line itself, as errors with a name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import click

from .errors import ConfigError

_YES = ("on", "true", "yes", "1")
_NO = ("off", "false", "no", "0")


def refuse_values_of_switches(command: click.Command, arguments: Sequence[str]) -> None:
    """``--packed-steps off`` would take ``off`` for the model: say how the switch is written.

    :raises ConfigError: with the form that turns the switch on or off.
    """
    for given, following in _pairs(arguments):
        switch = _switch(command, given)
        if switch is None or following.lower() not in (*_YES, *_NO) or Path(following).exists():
            continue
        right = _form(switch, following.lower() in _YES)
        raise ConfigError(
            f"{given} is a switch and takes no value, and {following!r} came after it: "
            + (f"write {right}" if right else "leave it out"),
            option=given,
            value=following,
            expected=right,
        )


def named(error: click.ClickException) -> ConfigError:
    """What click refused, as the error that ``--json`` prints."""
    option = getattr(error, "option_name", None)
    if option is None and isinstance(error, click.BadParameter) and error.param is not None:
        option = next(iter(error.param.opts), error.param.name)
    return ConfigError(
        error.format_message(), option=option, expected=list(getattr(error, "possibilities", None) or ()) or None
    )


def _pairs(arguments: Sequence[str]) -> Iterable[tuple[str, str]]:
    """Each option with what follows it, behind an equals sign or a space."""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if equals:
            yield name, value
    yield from pairwise(arguments)


def _switch(command: click.Command, given: str) -> click.Option | None:
    switches = (option for option in command.params if isinstance(option, click.Option) and option.is_flag)
    return next((option for option in switches if given in (*option.opts, *option.secondary_opts)), None)


def _form(switch: click.Option, wanted: bool) -> str | None:
    """The name that turns the switch on or off; None where leaving it out does."""
    names = switch.opts if wanted else switch.secondary_opts
    return names[0] if names else None
