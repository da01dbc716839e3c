"""Server-sent events as OpenAI-compatible servers send them, and what one event says about tokens.

Pure: bytes in, events out. One network read may hold part of an event or several, and one event several tokens.
"""

from dataclasses import dataclass
from typing import Any

import msgspec

DONE = b"[DONE]"


class SSEParser:
    """Incremental parser: ``feed`` bytes as they arrive, get the ``data`` of every event they complete.

    Follows the WHATWG event-stream format as far as these servers use it: lines end in LF or CRLF, an empty line
    ends an event, several ``data`` lines are joined by LF; comments and other fields are ignored.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of the events that ``chunk`` completes, in order."""
        lines = (self._rest + chunk).split(b"\n") if self._rest else chunk.split(b"\n")
        self._rest = lines.pop()
        events: list[bytes] = []
        for raw in lines:
            line = raw.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].lstrip(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data.clear()
        return events


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None
    timeline: dict[str, Any] | None = None


_decoder = msgspec.json.Decoder(_Chunk)


@dataclass(frozen=True, slots=True)
class Event:
    """What one event carries.

    ``num_tokens``: tokens in it; exact if ``has_token_ids``, else 1 for an event that bears text and 0 for one that
    does not. ``usage``: (prompt tokens, output tokens) or None. ``error``: the server's message or None.
    """

    num_tokens: int
    has_token_ids: bool = False
    finished: bool = False
    usage: tuple[int, int] | None = None
    error: str | None = None
    timeline: dict[str, Any] | None = None


def read_event(data: bytes) -> Event:
    """Decode one event's JSON. Raises ValueError when it is not an OpenAI stream chunk."""
    chunk = _decoder.decode(data)
    if chunk.error is not None:
        error = chunk.error
        return Event(0, error=str(error.get("message", error)) if isinstance(error, dict) else str(error))
    num_tokens, has_ids, finished = 0, False, False
    for choice in chunk.choices or ():
        finished = finished or choice.finish_reason is not None
        if choice.token_ids is not None:
            has_ids = True
            num_tokens += len(choice.token_ids)
        elif _bears_token(choice):
            num_tokens += 1
    usage = (chunk.usage.prompt_tokens, chunk.usage.completion_tokens) if chunk.usage else None
    return Event(num_tokens, has_ids, finished, usage, timeline=chunk.timeline)


def _bears_token(choice: _Choice) -> bool:
    if choice.delta is not None:
        # A chat stream opens with the role alone: that is no token.
        delta = choice.delta
        return bool(delta.content or delta.reasoning_content or delta.reasoning)
    # A completion's event without text and without an end is a token whose bytes are not yet a character.
    return bool(choice.text) or (choice.text is not None and choice.finish_reason is None)
