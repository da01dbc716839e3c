"""When disaggregation pays: a map over prompt and output lengths, objectives and links, of who wins and by how much.

    python -m benchmarks.goodput.when_it_pays            # about 40 minutes of two cores after `make fast`
    python -m benchmarks.goodput.when_it_pays --quick    # a corner of it, about a minute

A fleet of 8 instances of Llama-3.1-8B (an H100 each), and one of Llama-3.1-70B (TP 4 each), serves the same requests in
every mode of :mod:`benchmarks.goodput.fleet`. Its goodput is the largest rate at which 90% of them are within TTFT and
TPOT in a steady state. Arrivals are Poisson, lengths lognormal with a coefficient of variation of 0.6. Prefill and
decode instances are on different nodes; objectives are multiples of what an idle instance takes (``map_grid.py``).

What the table has already is not measured again: an interrupted run goes on, a whole one is only drawn.
"""

import argparse
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from benchmarks.common.rows import read_rows, write_rows
from benchmarks.goodput.fleet import Fleet, Found
from benchmarks.goodput.map_grid import QUICK, WHOLE, Grid, Point, fleet_at, with_bandwidth
from benchmarks.goodput.map_plot import draw
from benchmarks.goodput.map_report import report
from benchmarks.goodput.map_rows import Row
from distserve.bench.files import write_atomically

HERE = Path(__file__).parent
_FLOOR = 0.5
"""Of the best goodput among the modes before it: with less a mode is not looked at any closer."""


def measure_modes(fleet: Fleet, grid: Grid, known: Sequence[Row] = ()) -> Iterator[tuple[float, Found]]:
    """Every mode with every bandwidth (0: any) that is not ``known``, each at its best."""
    best: defaultdict[float, float] = defaultdict(float)
    for row in known:
        best[row.bandwidth] = max(best[row.bandwidth], row.goodput * fleet.num_gpus)
    done = {(row.mode, row.bandwidth) for row in known}
    for mode in grid.modes:
        last: Found | None = None
        for bandwidth in grid.bandwidths if mode.moves_kv else (0.0,):
            if (mode.name, bandwidth) in done:
                continue
            there = with_bandwidth(fleet, bandwidth) if mode.moves_kv else fleet
            floor = _FLOOR * max(best[0.0], best[bandwidth])
            last = there.best(mode, floor) if last is None else there.unless_slower(last, floor)
            best[bandwidth] = max(best[bandwidth], last.goodput.interval.estimate)
            yield bandwidth, last


def measure_point(point: Point, grid: Grid, seed: int = 0, known: Sequence[Row] = ()) -> tuple[list[Row], int]:
    """The rows that one point of the map lacks, and how many requests it took to simulate them."""
    fleet = fleet_at(point, grid.pace, seed)
    rows: list[Row] = []
    simulated = 0
    for bandwidth, found in measure_modes(fleet, grid, known):
        goodput = found.goodput
        simulated += found.num_simulated
        rows.append(
            Row(
                *point.key,
                bandwidth=bandwidth,
                mode=found.mode.name,
                goodput=round(goodput.interval.estimate / fleet.num_gpus, 4),
                low=round(goodput.low / fleet.num_gpus, 4),
                high=round(goodput.high / fleet.num_gpus, 4),
                setting=found.setting,
                binding=found.binding,
                ttft=fleet.problem.slo.ttft,
                tpot=fleet.problem.slo.tpot,
            )
        )
    return rows, simulated


def measure_map(grid: Grid, path: Path, seed: int = 0, workers: int = 1) -> list[Row]:
    """Measure what the table at ``path`` lacks of the map, keep it up to date, and say how far it is.

    Every one of ``workers`` processes has a point of the map at a time; rows are in the order of the grid all the same.
    """
    rows = read_rows(path, Row)
    whole = sum(len(grid.bandwidths) if mode.moves_kv else 1 for mode in grid.modes)
    known: defaultdict[tuple[str, str, int, int], list[Row]] = defaultdict(list)
    for row in rows:
        if row.bandwidth in {0.0, *grid.bandwidths}:
            known[row.key].append(row)
    points = list(grid.points())
    missing = [point for point in points if len(known[point.key]) < whole]
    place = {point.key: number for number, point in enumerate(points)}
    began = time.perf_counter()
    # Spawned, not forked: the caller may have threads.
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        measured = {pool.submit(measure_point, point, grid, seed, known[point.key]): point for point in missing}
        try:
            for number, future in enumerate(as_completed(measured), 1):
                point, (found, simulated) = measured[future], future.result()
                rows = sorted(rows + found, key=lambda row: place.get(row.key, len(place)))
                write_rows(path, Row, rows)
                left = (time.perf_counter() - began) / number * (len(missing) - number) / 60
                shown = ", ".join(f"{row.mode} {row.goodput:.3g}" for row in found)
                print(
                    f"[{len(points) - len(missing) + number}/{len(points)}] {point.served.model.name}, "
                    f"{point.objective.name}, {point.prompt} in, {point.output} out: {shown} requests/s/GPU "
                    f"({simulated:,} simulated; {left:.0f} min left)",
                    flush=True,
                )
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return rows


def main() -> None:
    """Measure, write the tables and draw the map."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a corner of the map, short runs; into files of its own")
    parser.add_argument("--fresh", action="store_true", help="measure again what the table has already")
    parser.add_argument(
        "--seed", type=int, default=0, help="of all random numbers; others than 0 into files of their own"
    )
    parser.add_argument("--outputs", type=int, nargs="+", metavar="TOKENS", help="only these output lengths of the map")
    parser.add_argument("--links", type=int, metavar="N", help="only the N fastest links of the map")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="directory of table and picture")
    options = parser.parse_args()
    grid = QUICK if options.quick else WHOLE
    if options.outputs is not None:
        wanted = tuple(length for length in grid.outputs if length in options.outputs)
        if not wanted:
            sys.exit(f"--outputs: the map has {', '.join(map(str, grid.outputs))}")
        grid = replace(grid, outputs=wanted)
    grid = replace(grid, bandwidths=grid.bandwidths[: options.links])
    options.output.mkdir(parents=True, exist_ok=True)
    stem = "when_it_pays" + "_quick" * options.quick + (f"_seed{options.seed}" if options.seed else "")
    table, picture = options.output / f"{stem}.csv", options.output / f"{stem}.png"
    if options.fresh:
        table.unlink(missing_ok=True)
    rows = measure_map(grid, table, options.seed, options.workers)
    write_atomically(picture, lambda temporary: draw(rows).savefig(temporary, dpi=110))
    figures = table.with_suffix(".md")
    command = " ".join(["python -m benchmarks.goodput.when_it_pays", *sys.argv[1:]])
    write_atomically(figures, lambda temporary: temporary.write_text(report(rows, command), encoding="utf-8"))
    print(f"{table}\n{figures}\n{picture}")


if __name__ == "__main__":
    main()
