"""The lines of the result table."""

from collections.abc import Sequence
from dataclasses import dataclass

_SCALES = {"B/s": (1e9, "GB/s"), "FLOP/s": (1e12, "TFLOP/s"), "tokens/s": (1.0, "tokens/s")}


@dataclass(frozen=True)
class Row:
    """One line of the table: rates in ``unit``, bytes, floating point operations or tokens per second."""

    what: str
    achieved: float
    ceiling: float
    unit: str
    against: str
    ratio: float
    wanted: float | None


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table: rates in GB/s, TFLOP/s and tokens/s."""
    lines = [
        "| what | achieved | ceiling | | of | ratio | wanted |",
        "|---|---:|---:|---|---|---:|---:|",
    ]
    for row in rows:
        scale, unit = _SCALES[row.unit]
        wanted = "" if row.wanted is None else f"{row.wanted:.2f}" + ("" if row.ratio >= row.wanted else " **missed**")
        lines.append(
            f"| {row.what} | {row.achieved / scale:,.1f} | {row.ceiling / scale:,.1f} | {unit} "
            f"| {row.against} | {row.ratio:.2f} | {wanted} |"
        )
    return "\n".join(lines)
