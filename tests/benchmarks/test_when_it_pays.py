"""The map of when disaggregation pays: modes on one fleet, their knobs, and who is said to win."""

from dataclasses import dataclass, replace
from math import log2
from pathlib import Path

import pytest

from benchmarks.common.rows import read_rows, write_rows
from benchmarks.goodput.fleet import MODES, Fleet, Knob, Mode, Pace
from benchmarks.goodput.map_grid import LLAMA_8B, QUICK, TIGHT_TPOT, Point, fleet_at, with_bandwidth
from benchmarks.goodput.map_plot import draw
from benchmarks.goodput.map_report import report
from benchmarks.goodput.map_rows import Row, judge
from benchmarks.goodput.when_it_pays import measure_map
from distserve.core.config import Role
from placement.goodput import Goodput
from placement.plan import Interval

SPLITFUSE, WHOLE, DISAGGREGATED, HYBRID = MODES
SHORT = Pace(residences=1.0, patiences=1.0, least=60, most=80)
BEST_BUDGET = 2048
ONE = replace(QUICK, objectives=(TIGHT_TPOT,), prompts=(5000,), outputs=(32,), pace=SHORT)


@pytest.fixture(scope="module")
def fleet() -> Fleet:
    return fleet_at(Point(LLAMA_8B, TIGHT_TPOT, 5000, 32), SHORT)


def row(mode: Mode, goodput: float, high: float | None = None, bandwidth: float = 0.0) -> Row:
    high = goodput if high is None else high
    return Row("m", "o", 1, 1, bandwidth, mode.name, goodput, goodput, high, "", "", 1.0, 1.0)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.letter)
def test_every_mode_has_the_whole_fleet_and_pools_share_no_node(fleet: Fleet, mode: Mode) -> None:
    for knob in fleet.knobs(mode):
        placement = fleet.placement(mode, knob)
        assert placement.num_gpus == fleet.num_gpus
        nodes = [{gpu.node for placed in placement.of(role) for gpu in placed.gpus} for role in Role]
        assert sum(map(len, nodes)) == len(set().union(*nodes))
        for placed in placement.instances:
            scheduler = placed.spec.scheduler
            assert placed.spec.role is not Role.MIXED or scheduler.max_batch_tokens >= scheduler.max_batch_size
    assert fleet.likely_knob(mode) in fleet.knobs(mode)


def test_the_climb_ends_at_a_split_as_good_wherever_it_begins(fleet: Fleet) -> None:
    fast = with_bandwidth(fleet, 50e9)
    likely, far = fast.best(DISAGGREGATED), fast.best(DISAGGREGATED, first=Knob(5))
    assert far.knob.num_prefill > 5
    ratio = far.goodput.interval.estimate / likely.goodput.interval.estimate
    assert 0.9 < ratio < 1.1


@dataclass(frozen=True)
class Terrain(Fleet):
    """A fleet whose goodput with 1, 2, ... of its instances prefilling is known beforehand, at its best budget."""

    rates: tuple[float, ...] = ()

    def goodput(self, mode: Mode, knob: Knob, floor: float, likely: float = 0.0) -> Goodput:
        """What is said of ``knob``; nothing else sees ``mode`` and ``likely``."""
        rate = self.rates[knob.num_prefill - 1]
        if knob.budget:
            rate *= 1 - 0.05 * abs(log2(knob.budget / BEST_BUDGET))
        holds = rate > floor
        return Goodput(Interval(rate * holds, rate * holds, max(rate, floor)), rate * holds, max(rate, floor), ())


def on_terrain(fleet: Fleet, *rates: float) -> Fleet:
    return Terrain(fleet.problem, fleet.parallel, fleet.num_instances, fleet.patience, rates=rates)


@pytest.mark.parametrize("first", range(1, 8))
def test_a_hybrid_may_have_two_peaks(fleet: Fleet, first: int) -> None:
    found = on_terrain(fleet, 2.0, 3.0, 6.0, 4.0, 3.0, 4.0, 5.0).best(HYBRID, 1.0, Knob(first, 256))
    assert found.knob == Knob(3, BEST_BUDGET)
    assert found.setting == f"3P + 5M, {BEST_BUDGET} tokens"


@pytest.mark.parametrize("mode", [DISAGGREGATED, HYBRID])
@pytest.mark.parametrize("first", range(1, 8))
def test_where_nothing_holds_the_floor_at_first_every_split_is_asked(fleet: Fleet, mode: Mode, first: int) -> None:
    knob = replace(fleet.likely_knob(mode), num_prefill=first)
    found = on_terrain(fleet, 0.5, 0.6, 0.7, 2.0, 0.4, 0.3, 0.2).best(mode, 1.0, knob)
    assert (found.knob.num_prefill, found.goodput.low) == (4, 2.0)
    assert on_terrain(fleet, 0.5, 0.6, 0.7, 0.8, 0.4, 0.3, 0.2).best(mode, 1.0, knob).goodput.low == 0


def test_a_slow_link_costs_goodput_and_a_link_that_is_fast_enough_none(fleet: Fleet) -> None:
    fast = with_bandwidth(fleet, 50e9)
    found = fast.best(DISAGGREGATED)
    assert with_bandwidth(fleet, 49e9).unless_slower(found).goodput == found.goodput
    slow = with_bandwidth(fleet, 1e9).unless_slower(found)
    assert slow.goodput.interval.estimate < 0.8 * found.goodput.interval.estimate


def test_what_is_below_the_floor_is_only_known_to_be(fleet: Fleet) -> None:
    whole = fleet.best(WHOLE)
    again = fleet.best(WHOLE, floor=1.5 * whole.goodput.high)
    assert again.goodput.interval.estimate == again.goodput.low == 0
    assert again.num_simulated < whole.num_simulated


def test_who_wins() -> None:
    split, whole = row(SPLITFUSE, 2.0), row(WHOLE, 1.0)
    assert judge([split, whole, row(DISAGGREGATED, 3.0)]) == judge([whole, split, row(DISAGGREGATED, 3.0)])
    ahead = judge([split, whole, row(DISAGGREGATED, 3.0)])
    assert (ahead.winner, ahead.ratio, ahead.is_bound) == ("D", 1.5, False)
    behind = judge([split, whole, row(DISAGGREGATED, 0.0, high=1.0)])
    assert (behind.winner, behind.ratio, behind.is_bound) == ("S", 0.5, True)
    assert judge([row(SPLITFUSE, 0.0), row(WHOLE, 0.0), row(DISAGGREGATED, 0.0)]).winner == ""
    alone = judge([row(SPLITFUSE, 0.0), row(WHOLE, 0.0), row(DISAGGREGATED, 1.0)])
    assert (alone.winner, alone.ratio) == ("D", float("inf"))


def test_the_figures_say_who_is_ahead_and_what_was_not_measured_closely() -> None:
    first = [row(SPLITFUSE, 2.0), row(WHOLE, 1.0), row(DISAGGREGATED, 3.0, bandwidth=5e9)]
    second = [replace(one, prompt=2) for one in (*first[:2], row(DISAGGREGATED, 0.0, high=1.0, bandwidth=5e9))]
    assert "| o | m | 5 | 1.50 to 1.50 (1.50; 1, 0, 0) |" in report(first, "again")
    text = report([*first, *second], "again")
    assert "| o | m | 5 | <0.50 to 1.50 (1, 0, 1) |" in text
    assert "| o | m | 0.50 to 0.50 (0.50; 0, 0, 2) |" in text


def test_an_interrupted_map_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "map.csv"
    rows = measure_map(ONE, table)
    assert "[1/1]" in capsys.readouterr().out
    assert len(rows) == 2 + 2 * len(ONE.bandwidths)
    assert read_rows(table, Row) == rows
    assert measure_map(ONE, table) == rows
    assert not capsys.readouterr().out, "nothing is measured twice"
    write_rows(table, Row, [row for row in rows if row.mode != HYBRID.name])
    assert measure_map(ONE, table) == rows, "a mode that is new is measured beside the others"
    picture = tmp_path / "map.png"
    draw(rows).savefig(picture)
    assert picture.stat().st_size > 0
