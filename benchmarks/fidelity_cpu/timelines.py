"""Measured requests as one line each, times in seconds of the run: the columns of a simulated run's timelines.

Client and instances have clocks that differ by a constant only, on one host. The client's is the one kept; what the
constant is follows from the requests themselves: no request was taken in before it was sent, and the one that was taken
in soonest is taken to have needed no time for it.
"""

import csv
import gzip
import io
from pathlib import Path
from typing import Any

COLUMNS = (
    "arrival",
    "prompt_tokens",
    "output_tokens",
    "prefill_start",
    "prefill_end",
    "first_token",
    "migration_start",
    "migration_end",
    "decode_start",
    "finish",
    "status",
)
_MARKS = ("prefill_start", "prefill_end", "migration_start", "migration_end", "decode_start")
Lines = list[dict[str, Any]]
"""One dictionary for each request, with these columns."""
_OK = 200
_NO_ANSWER = 599


def rows(requests: list[dict[str, Any]]) -> Lines:
    """From the requests of a ``distserve bench --return-timeline`` document; None is what did not happen."""
    answered = [r for r in requests if r["timeline"]]
    offset = min((r["timeline"]["arrival"] - r["sent"] for r in answered), default=0.0)
    return [_row(request, offset) for request in requests]


def _row(request: dict[str, Any], offset: float) -> dict[str, Any]:
    timeline = request["timeline"] or {}
    arrival = request["scheduled"]
    is_ok = request["status"] == "ok"
    return {
        "arrival": round(arrival, 6),
        "prompt_tokens": request["num_prompt_tokens"] or request["prompt_len"],
        "output_tokens": request["num_output_tokens"],
        **{name: None if timeline.get(name) is None else round(timeline[name] - offset, 6) for name in _MARKS},
        "first_token": None if request["ttft"] is None else round(arrival + request["ttft"], 6),
        "finish": round(arrival + request["latency"], 6) if is_ok else None,
        "status": _OK if is_ok else (request["http_status"] if request["http_status"] != _OK else _NO_ANSWER),
    }


def write(path: Path, lines: Lines) -> None:
    """Write gzipped CSV; the same lines give the same bytes."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    path.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))


def read(path: Path) -> Lines:
    """Read what :func:`write` wrote."""
    lines = csv.DictReader(io.StringIO(gzip.decompress(path.read_bytes()).decode()))
    return [{name: _number(name, value) for name, value in line.items()} for line in lines]


def _number(name: str, value: str) -> float | int | None:
    if value == "":
        return None
    return int(value) if name in {"prompt_tokens", "output_tokens", "status"} else float(value)
