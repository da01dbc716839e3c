"""The entries of a JSON array, one after the other: a file of any length takes the memory of its longest entry.

Streaming parsers that are to be had do not say on which line a file is broken, which is what one who mends it needs.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from distserve.bench.errors import WorkloadError

_CHUNK = 1 << 20
"""Characters read at a time."""

_LONGEST = 1 << 26
"""No entry has more characters: what does not end by then is damaged."""

_AFTER_VALUE = " \t\r\n,]"


def read_entries(path: Path, file: TextIO) -> Iterator[Any]:
    """The entries of the array in ``file``, which is called ``path`` in messages.

    Raises WorkloadError with the line where the file is no JSON array, or where its JSON is broken.
    """
    window = _Window(path, file)
    if window.peek() != "[":
        raise window.error("not a JSON array")
    window.at += 1
    if window.peek() == "]":
        window.at += 1
    else:
        yield window.value()
        while window.peek() == ",":
            window.at += 1
            yield window.value()
        if window.peek() != "]":
            raise window.error("not JSON: Expecting ',' delimiter")
        window.at += 1
    if window.peek():
        raise window.error("not JSON: Extra data")


class _Window:
    """The part of the file at hand; ``text[:at]`` is done with."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self.at = 0
        self._path = path
        self._file = file
        self._text = ""
        self._line, self._column = 1, 0
        """Where in the file the text begins; lines count from 1, columns from 0."""
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is no white space, empty at the end of the file; ``at`` is there."""
        while True:
            while self.at < len(self._text):
                if self._text[self.at] not in " \t\r\n":
                    return self._text[self.at]
                self.at += 1
            if not self._grow():
                return ""

    def value(self) -> Any:
        """Read a value."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self.at)
            except json.JSONDecodeError as error:
                if self._grow():
                    continue  # it was not all there
                self.at = error.pos
                raise self.error(f"not JSON: {error.msg}") from None
            is_over = end < len(self._text) and self._text[end] in _AFTER_VALUE
            if not is_over and self._grow():
                continue  # a number may go on
            self.at = end
            return value

    def error(self, what: str) -> WorkloadError:
        """``what`` is wrong where the window stands."""
        line, column = self._place()
        return WorkloadError(f"{self._path}:{line}: {what} at column {column + 1}")

    def _place(self) -> tuple[int, int]:
        done = self._text[: self.at]
        num_lines = done.count("\n")
        column = self.at - done.rfind("\n") - 1 if num_lines else self._column + self.at
        return self._line + num_lines, column

    def _grow(self) -> bool:
        """Read on, as much again as is at hand, so that nothing is scanned often.

        False at the end of the file, or if an entry is too long: then all stays as it is.
        """
        num_ahead = len(self._text) - self.at
        more = self._file.read(max(_CHUNK, num_ahead)) if num_ahead < _LONGEST else ""
        if not more:
            return False
        self._line, self._column = self._place()
        self._text = self._text[self.at :] + more
        self.at = 0
        return True
