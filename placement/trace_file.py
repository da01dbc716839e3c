"""Writes requests as a trace in the columns of Azure's public ones, which the planner and ``distserve bench`` read."""

import csv
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path


def write_trace(path: Path, requests: Iterable[tuple[float, int, int]]) -> int:
    """Write (arrival in seconds since the epoch, prompt tokens, output tokens), in order; returns their number."""
    num = 0
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["TIMESTAMP", "ContextTokens", "GeneratedTokens"])
        for time, prompt, output in requests:
            at = datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")
            rows.writerow([at, int(prompt), int(output)])
            num += 1
    return num
