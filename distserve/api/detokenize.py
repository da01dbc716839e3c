"""Text from tokens that arrive one by one: only whole characters, nothing released that a later token could change.

A detokenizer is fed every output token of one choice. The pieces it returns, with what ``flush`` returns at the end,
concatenate to the decoding of all tokens; bytes that never become a character come out as U+FFFD.
"""

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

from distserve.api.tokenizer import TextTokenizer

REPLACEMENT = "\ufffd"

CONTEXT_TOKENS = 6
"""Prompt tokens that a decoder sees before the first output token, so that its leading space survives."""

MAX_HELD_TOKENS = 16
"""A character takes at most 4 tokens; more that do not become one never will."""


class Detokenizer(Protocol):
    """Incremental decoding of one choice."""

    def feed(self, token_id: int) -> str:
        """The text that became certain with this token, possibly none."""
        ...

    def flush(self) -> str:
        """What is left at the end."""
        ...


class NoDetokenizer:
    """For a model without a tokenizer: every token's text is empty."""

    def feed(self, token_id: int) -> str:  # noqa: ARG002 - the protocol's
        """Nothing."""
        return ""

    def flush(self) -> str:
        """Nothing."""
        return ""


class ByteDetokenizer:
    """For byte-level vocabularies (GPT-2, Llama 3, Qwen, ...): a token is a byte string whatever its neighbours."""

    __slots__ = ("_decode", "_skipped", "_token_bytes")

    def __init__(self, tokenizer: TextTokenizer, *, skip_special_tokens: bool) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._token_bytes = tokenizer.token_bytes
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()

    def feed(self, token_id: int) -> str:
        """The characters this token's bytes complete."""
        if token_id in self._skipped:
            return ""
        return self._decode(self._token_bytes(token_id))

    def flush(self) -> str:
        """U+FFFD if the last character is incomplete."""
        return self._decode(b"", True)


class WindowDetokenizer:
    """For any other vocabulary: decodes a short window of tokens again with each one and releases the difference."""

    __slots__ = ("_decode", "_ids", "_prefix", "_prefix_length")

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int]) -> None:
        self._decode = decode
        self._ids = list(context)
        self._prefix_length = len(self._ids)
        self._prefix = decode(self._ids)

    def feed(self, token_id: int) -> str:
        """The text by which this token lengthens the window's, unless it ends within a character."""
        ids = self._ids
        ids.append(token_id)
        text = self._decode(ids)
        num_held = len(ids) - self._prefix_length
        if (text.endswith(REPLACEMENT) and num_held < MAX_HELD_TOKENS) or len(text) <= len(self._prefix):
            return ""
        piece = text[len(self._prefix) :]
        # The tokens just released become the context of the next.
        del ids[: self._prefix_length]
        self._prefix_length = len(ids)
        self._prefix = self._decode(ids)
        return piece

    def flush(self) -> str:
        """The rest of the window."""
        return self._decode(self._ids)[len(self._prefix) :]


def detokenizer_for(
    tokenizer: TextTokenizer | None, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool
) -> Detokenizer:
    """The detokenizer for one choice of a prompt."""
    if tokenizer is None:
        return NoDetokenizer()
    if tokenizer.is_byte_level:
        return ByteDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
    return WindowDetokenizer(
        lambda ids: tokenizer.decode(ids, skip_special_tokens=skip_special_tokens), prompt_token_ids[-CONTEXT_TOKENS:]
    )
