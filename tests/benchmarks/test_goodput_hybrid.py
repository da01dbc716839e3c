"""The hybrid's benchmarks: what they try, and what their tables say of what they found."""

from pathlib import Path

import pytest

from benchmarks.common.rows import read_rows, write_rows
from benchmarks.goodput import hybrid_fleet
from benchmarks.goodput.fleet import Knob, Pace
from benchmarks.goodput.hybrid import Composition, compositions, local_share, measure_cell, model_of, offered
from benchmarks.goodput.hybrid_loads import NAMES, OBJECTIVES, PAPER, find_load
from benchmarks.goodput.hybrid_report import KINDS, Row, chosen, draw, gains, report, whole_cells
from benchmarks.goodput.map_grid import LLAMA_8B, TIGHT_TPOT, Point
from simulator.simulation import simulate

CHAT = (2, "chat", "balanced")


def row(kind: str, goodput: float, composition: str = "", local: float = 0.0, seed: int = 0) -> Row:
    return Row(*CHAT, seed, kind, composition, goodput, local, 1000)


ROWS = [
    row("disaggregated", 100.0, "1P + 1D"),
    row("mixed", 80.0, "2M, 256 tokens"),
    row("mixed", 120.0, "2M, 512 tokens"),
    row("hybrid", 132.0, "1P + 1M, 512 tokens", local=0.25),
    row("hybrid", 0.0, "1P + 1M, 1024 tokens"),
    row("disaggregated", 125.0, "1P + 1D", seed=1),
    row("mixed", 120.0, "2M, 512 tokens", seed=1),
    row("hybrid", 130.0, "1P + 1M, 512 tokens", local=0.35, seed=1),
]


def test_every_composition_uses_all_instances() -> None:
    for count in (2, 4):
        tried = list(compositions(count))
        assert {composition.num_instances for composition in tried} == {count}
        assert {composition.kind for composition in tried} == set(KINDS)
        assert len(set(tried)) == len(tried)


@pytest.mark.parametrize("composition", [Composition(1, 1, 0), Composition(0, 0, 2, 512), Composition(1, 0, 1, 512)])
def test_a_light_load_is_served_within_the_objective(composition: Composition) -> None:
    load, slo = find_load("chat"), OBJECTIVES["balanced"]
    simulation = simulate(model_of(load, composition, slo), offered(load, 40.0, 0, 60))
    assert simulation.timelines.meets(slo).all()
    share = local_share(simulation)
    assert share == {"disaggregated": 0.0, "mixed": 1.0}.get(composition.kind, share)


@pytest.mark.parametrize("name", PAPER)
def test_two_cards_hold_what_the_paper_serves(name: str) -> None:
    load = find_load(name)
    (slo,) = load.objectives.values()
    simulation = simulate(model_of(load, Composition(1, 0, 1, 512), slo), offered(load, 0.5, 0, 10))
    assert simulation.timelines.meets(slo).all()


def test_the_table_holds_the_best_of_each_kind_against_the_better_pure_one(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.csv", Row, ROWS)
    assert read_rows(tmp_path / "rows.csv", Row) == ROWS
    ((cell, kinds),) = whole_cells(ROWS).items()
    assert cell == CHAT
    assert gains(kinds) == pytest.approx([132 / 120 - 1, 130 / 125 - 1])
    line = report(ROWS, 0.02).splitlines()[-1]
    assert "| 112 (1P + 1D) | 120 (2M, 512 tokens) | 131 (1P + 1M, 512 tokens) | 30% |" in line
    assert line.endswith("| +7.0% (+4.0% to +10.0%) | 2 |")
    draw(ROWS, tmp_path / "goodput.png")
    assert (tmp_path / "goodput.png").stat().st_size > 0


def test_a_cell_that_lacks_a_kind_is_not_in_the_table() -> None:
    assert whole_cells([row for row in ROWS if row.kind != "mixed"]) == {}


def test_other_seeds_have_what_the_first_one_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def goodput(*args: object, **_: object) -> tuple[float, float, int]:
        tried.append(str(args[2]))
        return 1.0, 0.5, 10

    monkeypatch.setattr("benchmarks.goodput.hybrid.goodput", goodput)
    rows = measure_cell(CHAT, 2, ROWS)
    assert tried == ["1P + 1D", "2M, 512 tokens", "1P + 1M, 512 tokens"]
    assert chosen(ROWS, CHAT) == {row.kind: row.composition for row in rows}
    assert {row.seed for row in rows} == {2}


def test_every_load_has_its_objectives() -> None:
    assert {name: len(find_load(name).objectives) for name in NAMES} == {
        name: 1 if name in PAPER else 3 for name in NAMES
    }


def test_a_cell_of_the_map_closely(monkeypatch: pytest.MonkeyPatch) -> None:
    short = Pace(residences=1.0, patiences=1.0, least=60, most=80)
    monkeypatch.setattr(hybrid_fleet, "PACE", short)
    point = Point(LLAMA_8B, TIGHT_TPOT, 5000, 32)
    knobs = {
        "disaggregated": Knob(6),
        "SplitFuse": Knob(budget=256),
        "whole prompts": Knob(budget=2560),
        "hybrid": Knob(6, 512),
    }
    rows = list(hybrid_fleet.measure(point, 1, knobs, {"disaggregated": 40.0, "hybrid": 40.0}))
    assert {row.mode: row.knob for row in rows} == knobs
    assert [row.local for row in rows if row.mode != "hybrid" and row.goodput] == [0.0]
    (gain,) = hybrid_fleet.gains(rows)
    assert gain == pytest.approx(rows[-1].goodput / rows[0].goodput - 1)
    assert hybrid_fleet.report(rows).splitlines()[-1].endswith(f"| {gain:+.1%} | {gain:+.1%} to {gain:+.1%} | 1 |")
