"""Per-request timelines as files, CSV or Parquet: the format that docs/timeline-format.md defines.

One row per request offered, in order of arrival; a cell that is empty (null) did not happen. Rows are written a batch
at a time, so a file takes no more memory than the timelines themselves.
"""

import csv
import gzip
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distserve.bench.files import write_atomically
from distserve.core.errors import ConfigError
from simulator.results import Simulation

TIMES = ("prefill_start", "prefill_end", "first_token", "migration_start", "migration_end", "decode_start", "finish")
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
    "num_attempts",
    "prefill_instance",
    "decode_instance",
)
"""In order; the first eleven are those of a measured run too."""
SCHEMA = "distserve-timelines/1"
_INSTANCES = {"prefill_instance": "prefill_id", "decode_instance": "decode_id"}
_BATCH = 65_536


def check_suffix(path: Path) -> None:
    """Raise ConfigError unless :func:`write_timelines` knows how to write ``path``."""
    if not path.name.endswith((".csv", ".csv.gz", ".parquet")):
        raise ConfigError(f"{path}: timelines are written as .csv, .csv.gz or .parquet")


def write_timelines(path: Path, simulation: Simulation) -> None:
    """Write ``simulation``'s timelines to ``path`` as its suffix says (.csv, .csv.gz or .parquet); whole or not at all.

    Raises ConfigError for another suffix.
    """
    check_suffix(path)
    if path.suffix == ".parquet":
        write_atomically(path, lambda temporary: _write_parquet(temporary, simulation))
    else:
        write_atomically(path, lambda temporary: _write_csv(temporary, simulation, zipped=path.suffix == ".gz"))


def _batches(simulation: Simulation) -> Iterator[dict[str, list[Any]]]:
    """Columns of plain values, None for what did not happen, some thousand rows at a time."""
    timelines = simulation.timelines
    names = [usage.instance_id for usage in simulation.instances]
    for start in range(0, len(timelines), _BATCH):
        rows = slice(start, start + _BATCH)
        batch: dict[str, list[Any]] = {}
        for column in COLUMNS:
            if column in _INSTANCES:
                indices = getattr(timelines, _INSTANCES[column])[rows].tolist()
                batch[column] = [names[index] if index >= 0 else None for index in indices]
            elif column == "arrival" or column in TIMES:
                seconds = getattr(timelines, column)[rows].tolist()
                batch[column] = [None if math.isnan(time) else round(time, 6) for time in seconds]
            else:
                batch[column] = getattr(timelines, column)[rows].tolist()
        yield batch


def _write_csv(path: Path, simulation: Simulation, *, zipped: bool) -> None:
    with path.open("wb") as raw:
        # No time and no name in the archive: the same timelines are the same bytes.
        stream = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if zipped else raw
        with io.TextIOWrapper(stream, encoding="utf-8", newline="") as text:
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(COLUMNS)
            for batch in _batches(simulation):
                writer.writerows(zip(*batch.values(), strict=True))


def _write_parquet(path: Path, simulation: Simulation) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def kind(column: str) -> pa.DataType:
        if column in _INSTANCES:
            return pa.dictionary(pa.int32(), pa.string())
        return pa.float64() if column == "arrival" or column in TIMES else pa.int64()

    schema = pa.schema([(column, kind(column)) for column in COLUMNS], metadata={"schema": SCHEMA})
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in _batches(simulation):
            arrays = [pa.array(batch[column], kind(column)) for column in COLUMNS]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
