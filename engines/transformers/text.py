"""Text from tokens as they come: nothing is shown that a later token could still change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_BROKEN = "\ufffd"
"""What tokenizers decode an unfinished character to."""


class Tokenizer(Protocol):
    """What the engine asks of a tokenizer; those of transformers have it."""

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = ...) -> str:
        """Text of ``token_ids``."""


class TextStream:
    """The text of one request's growing output.

    Each step decodes only a short window: tokens since the last certain boundary, with those of the step before
    in front, since a token's text (a leading space, say) may depend on its left neighbour.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._window = 0
        self._shown = 0
        self.text = ""

    def push(self, token: int) -> str:
        """Text that became certain with ``token``; empty while a character is unfinished."""
        self._tokens.append(token)
        return self._advance(final=False)

    def finish(self) -> str:
        """What was held back; an unfinished character at the very end becomes U+FFFD."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        before = self._decode(self._window, self._shown)
        now = self._decode(self._window, len(self._tokens))
        if now.endswith(_BROKEN) and not final:
            return ""
        if len(now) <= len(before) and not final:
            return ""
        self._window, self._shown = self._shown, len(self._tokens)
        new = now[len(before) :]
        self.text += new
        return new

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._tokens[start:end], skip_special_tokens=True)
