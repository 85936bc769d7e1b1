"""Text as it streams: whole characters only, and in the end exactly what decoding all tokens gives."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from makeready.engines.transformers.text import TextStream


class ByteTokenizer:
    """One token per byte; token 256 is special and has no text."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids, skip_special_tokens=False):
        return bytes(token for token in token_ids if token < 256).decode(errors="replace")


class WordTokenizer:
    """A word's text has a space in front unless it comes first: what sentencepiece does."""

    WORDS = ("one", "two", "three")

    def encode(self, text: str) -> list[int]:
        return [self.WORDS.index(word) for word in text.split()]

    def decode(self, token_ids, skip_special_tokens=False):
        return " ".join(self.WORDS[token] for token in token_ids)


def streamed(tokenizer, tokens) -> list[str]:
    stream = TextStream(tokenizer)
    parts = [stream.push(token) for token in tokens] + [stream.finish()]
    assert "".join(parts) == stream.text
    return parts


def test_a_character_waits_for_its_last_byte():
    parts = streamed(ByteTokenizer(), ByteTokenizer().encode("a€🐢b"))
    assert parts == ["a", "", "", "€", "", "", "", "🐢", "b", ""]


def test_an_unfinished_character_at_the_end_is_shown_as_such():
    assert streamed(ByteTokenizer(), [97, 0xE2, 0x82]) == ["a", "", "", "\ufffd"]


def test_spaces_between_words_stay():
    assert streamed(WordTokenizer(), [0, 1, 2, 0]) == ["one", " two", " three", " one", ""]


@given(st.text(max_size=30))
def test_nothing_is_lost_or_repeated(text):
    assert "".join(streamed(ByteTokenizer(), ByteTokenizer().encode(text))) == text


@pytest.mark.parametrize("tokens", [[256], [97, 256, 98], [0xE2, 256, 0x82, 0xAC]])
def test_special_tokens_have_no_text(tokens):
    assert "".join(streamed(ByteTokenizer(), tokens)) == ByteTokenizer().decode(tokens)
