"""Find stop strings in text that arrives in pieces, releasing every character as early as it is safe.

The stop string that is complete first wins (of those complete at the same character, the longest), which makes the
result independent of how the text is cut into pieces. Knuth, Morris and Pratt's automaton per stop string: its state is
the length of the match so far, so the longest state is exactly how many characters must be held back.
"""

from collections.abc import Sequence


def _failure_table(pattern: str) -> list[int]:
    """``table[i]``: length of the longest proper border of ``pattern[: i + 1]``."""
    table = [0] * len(pattern)
    length = 0
    for i in range(1, len(pattern)):
        while length and pattern[i] != pattern[length]:
            length = table[length - 1]
        if pattern[i] == pattern[length]:
            length += 1
        table[i] = length
    return table


class StopMatcher:
    """Searches one choice's text. ``stops`` are non-empty strings."""

    __slots__ = ("_held", "_include", "_patterns", "_states")

    def __init__(self, stops: Sequence[str], *, include: bool) -> None:
        assert all(stops)
        # Longest first: the first one found complete at a character is the longest there.
        ordered = sorted(stops, key=len, reverse=True)
        self._patterns = [(stop, _failure_table(stop)) for stop in ordered]
        self._states = [0] * len(ordered)
        self._held = ""
        self._include = include

    def feed(self, piece: str) -> tuple[str, str | None]:
        """Take the next piece of text.

        Returns what may be released now and the stop string found, if any; after that the text is over.
        """
        states = self._states
        for position, char in enumerate(piece):
            for i, (stop, table) in enumerate(self._patterns):
                length = states[i]
                while length and stop[length] != char:
                    length = table[length - 1]
                if stop[length] == char:
                    length += 1
                if length == len(stop):
                    text = self._held + piece[: position + 1]
                    self._held = ""
                    return (text if self._include else text[: len(text) - length]), stop
                states[i] = length
        text = self._held + piece
        hold = max(states)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold], None

    def flush(self) -> str:
        """The text ends here: what was held back only because it could have become a stop string."""
        held, self._held = self._held, ""
        return held
