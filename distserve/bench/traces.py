"""Reading published traces: Azure CSV, Mooncake JSON lines, ShareGPT JSON.

All are read as a stream, of which lengths, times and the identities of blocks are kept. A malformed file raises
WorkloadError with the file and the line (for ShareGPT, one JSON array, the entry). Nothing is skipped silently, apart
from ShareGPT conversations without a human turn followed by an answer, which are counted.
"""

import csv
import json
import math
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from distserve.bench.arrivals import Times
from distserve.bench.errors import WorkloadError
from distserve.bench.json_array import read_entries
from distserve.bench.lengths import Lengths

MOONCAKE_BLOCK_TOKENS = 512
"""Tokens that one entry of a Mooncake trace's ``hash_ids`` stands for."""

CHARS_PER_TOKEN = 4.0
"""Rule of thumb for ShareGPT texts when no tokenizer is given."""

_MOST_TOKENS = 10**9
"""No request is longer; what claims to be is a damaged file."""

_ASKERS = ("human", "user")
_ANSWERERS = ("gpt", "chatgpt", "assistant", "bing", "bard")

FORMATS = ("azure", "mooncake", "sharegpt")


@dataclass(frozen=True)
class Trace:
    """Requests of a trace in order of arrival.

    ``timestamps``: seconds from the first arrival, or None (ShareGPT has none). ``prefix_blocks``: per request, the
    identities of its prompt's blocks of MOONCAKE_BLOCK_TOKENS tokens (equal identities mean equal tokens), or None.
    ``note``: what a reader of the report must know about how the lengths came about.
    """

    prompt_lens: Lengths
    output_lens: Lengths
    timestamps: Times | None = None
    prefix_blocks: tuple[tuple[int, ...], ...] | None = None
    note: str = ""

    def __len__(self) -> int:
        return len(self.prompt_lens)

    def window(self, start: float, end: float | None) -> "Trace":
        """The requests that arrive in ``[start, end)`` seconds of the trace's own time, shifted to begin at zero.

        Raises WorkloadError when the trace has no timestamps or nothing arrives in the window.
        """
        if self.timestamps is None:
            raise WorkloadError("this trace has no timestamps: a window of it cannot be cut")
        keep: NDArray[np.bool_] = self.timestamps >= start
        if end is not None:
            keep &= self.timestamps < end
        if not keep.any():
            raise WorkloadError(
                f"no request arrives in the window from {start:g} s to {'the end' if end is None else f'{end:g} s'}; "
                f"the trace spans {self.timestamps[-1]:.0f} s"
            )
        blocks = self.prefix_blocks
        return Trace(
            self.prompt_lens[keep],
            self.output_lens[keep],
            self.timestamps[keep] - start,
            None if blocks is None else tuple(blocks[i] for i in np.flatnonzero(keep)),
            self.note,
        )


def read_trace(path: Path, fmt: str = "auto", count_tokens: Callable[[str], int] | None = None) -> Trace:
    """Read ``path`` as ``fmt`` (one of FORMATS, or ``auto``: by the file's beginning).

    ``count_tokens`` counts ShareGPT texts; without it their characters are divided by CHARS_PER_TOKEN.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:  # spreadsheets begin a file with a mark
            if fmt == "auto":
                fmt = _detect(path, file)
            if fmt == "azure":
                trace = _read_azure(path, file)
            elif fmt == "mooncake":
                trace = _read_mooncake(path, file)
            else:
                trace = _read_sharegpt(path, file, count_tokens)
    except OSError as error:
        raise WorkloadError(f"cannot read the trace {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise WorkloadError(f"{path}: not a text file in UTF-8 ({error.reason} at byte {error.start})") from error
    if not len(trace):
        raise WorkloadError(f"{path}: the trace holds no request")
    return trace


def _detect(path: Path, file: TextIO) -> str:
    head = file.read(4096).lstrip(" \t\r\n")
    file.seek(0)
    if head.startswith("["):
        return "sharegpt"
    if head.startswith("{"):
        return "mooncake"
    if head.split("\n", 1)[0].strip().startswith("TIMESTAMP,"):
        return "azure"
    raise WorkloadError(
        f"{path}: not recognised as a trace. Expected a CSV that begins with the line "
        "'TIMESTAMP,ContextTokens,GeneratedTokens' (azure), JSON lines (mooncake) or a JSON array (sharegpt)"
    )


def _read_azure(path: Path, file: TextIO) -> Trace:
    rows = csv.reader(file)
    header = next(rows, [])
    names = [name.strip() for name in header]
    columns = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
    if any(column not in names for column in columns):
        raise WorkloadError(f"{path}:1: the header must name {', '.join(columns)}; it is {','.join(header)!r}")
    time_at, prompt_at, output_at = (names.index(column) for column in columns)
    times, prompts, outputs = _columns()
    for row in _csv_rows(path, rows):
        if not row:
            continue
        where = f"{path}:{rows.line_num}"
        if len(row) != len(names):
            raise WorkloadError(f"{where}: {len(row)} fields where the header has {len(names)}")
        times.append(_azure_seconds(where, row[time_at]))
        prompts.append(_csv_count(where, "ContextTokens", row[prompt_at]))
        outputs.append(_csv_count(where, "GeneratedTokens", row[output_at]))
    return _in_order(times, prompts, outputs)


def _csv_rows(path: Path, rows: Any) -> Iterator[list[str]]:
    try:
        yield from rows
    except csv.Error as error:
        raise WorkloadError(f"{path}:{rows.line_num}: not a CSV: {error}") from error


def _columns() -> "tuple[array[float], array[int], array[int]]":
    """Arrivals, prompt and output lengths, eight bytes each: a trace of millions is read line by line into these."""
    return array("d"), array("q"), array("q")


def _azure_seconds(where: str, text: str) -> float:
    try:
        # The file's seventh digit (100 ns) is dropped by fromisoformat.
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise WorkloadError(f"{where}: TIMESTAMP {text!r} is not like 2023-11-16 18:15:46.6805900") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _csv_count(where: str, name: str, text: str) -> int:
    try:
        return _count(where, name, int(text))
    except ValueError:
        raise WorkloadError(f"{where}: {name} must be a whole number, not {text!r}") from None


def _count(where: str, name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MOST_TOKENS:
        raise WorkloadError(f"{where}: {name} must be a whole number, 0 or more, not {value!r}")
    # A request with nothing in it cannot be sent: the shortest is one token.
    return max(value, 1)


def _read_mooncake(path: Path, file: TextIO) -> Trace:
    times, prompts, outputs = _columns()
    blocks: list[tuple[int, ...]] = []
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        entry = _json_object(where, line)
        stamp = entry.get("timestamp")
        if not isinstance(stamp, int | float) or isinstance(stamp, bool) or not math.isfinite(stamp):
            raise WorkloadError(f"{where}: timestamp must be a number of milliseconds, not {stamp!r}")
        times.append(stamp / 1000)
        prompts.append(_count(where, "input_length", entry.get("input_length")))
        outputs.append(_count(where, "output_length", entry.get("output_length")))
        ids = entry.get("hash_ids", [])
        if not isinstance(ids, list) or any(not isinstance(i, int) or i < 0 for i in ids):
            raise WorkloadError(f"{where}: hash_ids must be a list of whole numbers")
        blocks.append(tuple(ids))
    return _in_order(times, prompts, outputs, blocks)


def _json_object(where: str, line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise WorkloadError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(entry, dict):
        raise WorkloadError(f"{where}: a line must be a JSON object")
    return entry


def _read_sharegpt(path: Path, file: TextIO, count_tokens: Callable[[str], int] | None) -> Trace:
    count = count_tokens or (lambda text: math.ceil(len(text) / CHARS_PER_TOKEN))
    _, prompts, outputs = _columns()
    skipped = 0
    for number, entry in enumerate(read_entries(path, file)):
        pair = _first_exchange(f"{path}: entry {number}", entry)
        if pair is None:
            skipped += 1
            continue
        prompts.append(max(count(pair[0]), 1))
        outputs.append(max(count(pair[1]), 1))
    notes = [] if count_tokens else [f"lengths are characters / {CHARS_PER_TOKEN:g}: no tokenizer was given"]
    if skipped:
        notes.append(f"{skipped} of {skipped + len(prompts)} conversations have no question followed by an answer")
    return Trace(np.array(prompts, np.int64), np.array(outputs, np.int64), note="; ".join(notes))


def _first_exchange(where: str, entry: Any) -> tuple[str, str] | None:
    turns = entry.get("conversations", entry.get("conversation")) if isinstance(entry, dict) else None
    if not isinstance(turns, list):
        raise WorkloadError(f"{where}: no list of turns under 'conversations'")
    for turn in turns:
        if (
            not isinstance(turn, dict)
            or not isinstance(turn.get("value"), str)
            or not isinstance(turn.get("from"), str)
        ):
            raise WorkloadError(f"{where}: a turn must have the strings 'from' and 'value'")
    for question, answer in pairwise(turns):
        asked = question["from"] in _ASKERS and answer["from"] in _ANSWERERS
        if asked and question["value"] and answer["value"]:
            return question["value"], answer["value"]
    return None


def _in_order(
    times: "array[float]",
    prompts: "array[int]",
    outputs: "array[int]",
    blocks: list[tuple[int, ...]] | None = None,
) -> Trace:
    stamps = np.array(times, np.float64)
    order = np.argsort(stamps, kind="stable")
    if len(order):
        stamps = stamps[order] - stamps[order[0]]
    return Trace(
        np.array(prompts, np.int64)[order],
        np.array(outputs, np.int64)[order],
        stamps,
        None if blocks is None or not any(blocks) else tuple(blocks[i] for i in order),
    )
