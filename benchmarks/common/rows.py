"""Tables as CSV files: a dataclass says what a row is."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from distserve.bench.files import write_atomically

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

RowT = TypeVar("RowT", bound="DataclassInstance")


def read_rows(path: Path, kind: type[RowT]) -> list[RowT]:
    """The rows written so far; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [msgspec.convert(line, kind, strict=False) for line in csv.DictReader(file)]


def write_rows(path: Path, kind: type[RowT], rows: Sequence[RowT]) -> None:
    """Write all rows, or leave what is there."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(kind)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)

    write_atomically(path, write)
