"""The hybrid's benchmark: what it tries, and what its table says of what it found."""

from pathlib import Path

import pytest

from benchmarks.common.rows import read_rows, write_rows
from benchmarks.goodput.hybrid import (
    KINDS,
    OBJECTIVES,
    Composition,
    Row,
    cells,
    compositions,
    gain,
    local_share,
    model_of,
    offered,
    report,
)
from simulator.simulation import simulate


def row(kind: str, goodput: float, composition: str = "", local: float = 0.0) -> Row:
    return Row(2, "chat", "balanced", kind, composition, goodput, local, 1000)


def test_every_composition_uses_all_instances() -> None:
    for count in (2, 4):
        tried = list(compositions(count))
        assert {composition.num_instances for composition in tried} == {count}
        assert {composition.kind for composition in tried} == set(KINDS)
        assert len(set(tried)) == len(tried)


@pytest.mark.parametrize("composition", [Composition(1, 1, 0), Composition(0, 0, 2, 512), Composition(1, 0, 1, 512)])
def test_a_light_load_is_served_within_the_objective(composition: Composition) -> None:
    slo = OBJECTIVES["balanced"]
    simulation = simulate(model_of(composition, slo), offered("chat", 40.0, 0, 60))
    assert simulation.timelines.meets(slo).all()
    share = local_share(simulation)
    assert share == {"disaggregated": 0.0, "mixed": 1.0}.get(composition.kind, share)


def test_the_table_holds_the_best_of_each_kind_against_the_better_pure_one(tmp_path: Path) -> None:
    rows = [
        row("disaggregated", 100.0, "1P + 1D"),
        row("mixed", 80.0, "2M, 256 tokens"),
        row("mixed", 120.0, "2M, 512 tokens"),
        row("hybrid", 132.0, "1P + 1M, 512 tokens", local=0.25),
        row("hybrid", 0.0, "1P + 1M, 1024 tokens"),
    ]
    write_rows(tmp_path / "rows.csv", Row, rows)
    assert read_rows(tmp_path / "rows.csv", Row) == rows
    ((cell, kinds),) = cells(rows).items()
    assert cell == (2, "chat", "balanced")
    assert gain(kinds) == pytest.approx(0.1)
    assert "| 120 (2M, 512 tokens) | 132 (1P + 1M, 512 tokens) | 25% | +10.0% |" in report(rows)
