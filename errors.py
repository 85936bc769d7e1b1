"""Named errors. Every message is one sentence with the option or file, the value, and what would be right."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class MakereadyError(Exception):
    """Base of all errors that a caller can cause; the command line turns it into exit code 2.

    :param message: the sentence to show.
    :param option: the option, setting or file that is wrong, as the user wrote it.
    :param value: what was found there.
    :param expected: what would be right, in words or as a list of values.
    """

    def __init__(
        self,
        message: str,
        *,
        option: str | None = None,
        value: object = None,
        expected: object = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.option = option
        self.value = value
        self.expected = expected

    def to_dict(self) -> dict[str, object]:
        """The error as JSON-ready values: ``error``, ``message``, ``option``, ``value``, ``expected``."""
        plain = (str, int, float, bool, type(None))

        def clean(item: object) -> object:
            if isinstance(item, plain):
                return item
            if isinstance(item, (list, tuple, set, frozenset)):
                return [clean(part) for part in item]
            return str(item)

        return {
            "error": type(self).__name__,
            "message": self.message,
            "option": self.option,
            "value": clean(self.value),
            "expected": clean(self.expected),
        }


class ConfigError(MakereadyError, ValueError):
    """A setting has a value that it cannot take."""


class ModelConfigError(MakereadyError, ValueError):
    """A model's config.json is missing, broken, or lacks a field."""


class UnsupportedModelError(MakereadyError, ValueError):
    """The model's family, or its version in the host library, cannot be served right."""


class BlockSizeError(MakereadyError, ValueError):
    """No KV block size satisfies every constraint; the message names the owners that clash."""


class CapacityError(MakereadyError, ValueError):
    """The memory budget, or the cache, is too small for what was asked."""


class PlatformError(MakereadyError, ValueError):
    """The platform is unknown, not installed, or its probe refused it."""


class BackendError(MakereadyError, ValueError):
    """No attention backend, or not the one asked for, can serve a layer."""


class PluginError(MakereadyError, RuntimeError):
    """A plugin failed to import, to verify, or registered something twice."""


class RequestError(MakereadyError, ValueError):
    """A generation request cannot be served: empty prompt, too long, or bad sampling settings."""


class IntegrityError(MakereadyError, RuntimeError):
    """A block, slot or state was used by somebody who does not own it, or books do not balance."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``, did you mean X or Y`` with the names of ``known`` that come close to ``word``; empty where none does."""
    close = get_close_matches(word, list(known), n=2)
    return f", did you mean {' or '.join(close)}" if close else ""
