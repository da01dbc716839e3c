"""How far we reach: each figure that is to be reached against vLLM on the same cores, in one run.

    python -m benchmarks.goodput.reach --model MODEL --vllm VENV               # from the repository's root; 50 minutes
    python -m benchmarks.goodput.reach ... --minutes 20                        # a slice: begins nothing new after that
    python -m benchmarks.goodput.reach ... --only whole --only tails           # whole, cores, tails
    python -m benchmarks.goodput.reach --report                                # the table of what is there
    python -m benchmarks.goodput.reach ... --quick --output-dir SOMEWHERE      # a rehearsal

MODEL and VENV as for ``benchmarks.goodput.real``, whose goodputs are in the table too. Every figure is kept as soon as
it is measured, and a later invocation goes on where this one stopped; what was measured while other processes took the
cores is not kept (``--max-other-load``).

whole   one mixed instance on all cores against vLLM on all cores: closed loops of 1, 8 and 32 clients, and latencies
        of a single request. First every token budget of a step is tried once on both sides; then both are up with the
        budgets that were best for a cell, and take turns for three rounds. vLLM is stopped while ours is asked.
cores   the prefill and the decode instance of 1 + 1 against vLLM on one core, likewise.
tails   the 99th percentile of gaps between tokens of 1 + 1, at 3 requests/s and with one client.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from benchmarks.common.load import LoadError, summary
from benchmarks.common.machine import commit
from benchmarks.common.measure import OPEN_LOOP_LENGTHS, Client
from benchmarks.common.progress import say
from benchmarks.common.servers import Server, ServerError, unwind_on_sigterm
from benchmarks.common.slices import Slice, SliceOverError
from benchmarks.common.store import Store
from benchmarks.common.systems import Bench, alone
from benchmarks.goodput.measured.contenders import CONTENDERS, Contender
from benchmarks.goodput.measured.invocation import parse, parser_for, prepared
from benchmarks.goodput.measured.reach_report import Cell, best_budget, round_name, tail_name, tune_name, write_report
from benchmarks.goodput.measured.results import Results

RESULTS = Path(__file__).parent / "results" / "reach"
REAL = Path(__file__).parent / "results" / "real"
PARTS = ("whole", "cores", "tails")
BUDGETS = (2048, 1024, 512, 256)
"""Tokens a step, on both sides; the longest sequence is 2048."""
TAIL_RATE = 3.0
Measure = Callable[[Client, Server, int], float]


def closed_loop(clients: int, per_client: int) -> Measure:
    """Output tokens/s of so many clients."""

    def measure(client: Client, server: Server, seed: int) -> float:
        return client.closed_loop(server, seed, clients, per_client)["output_tokens_per_second"]

    return measure


def tpot_alone(client: Client, server: Server, seed: int) -> float:
    """Median TPOT of one client."""
    return client.closed_loop(server, seed, 1, 6)["tpot"]


def ttft(prompt_len: int) -> Measure:
    """Of a single prompt."""
    return lambda client, server, seed: client.ttft(server, seed, prompt_len)


def prompt_speed(client: Client, server: Server, seed: int) -> float:
    """Tokens/s of a prompt of 1024 tokens that has the server to itself."""
    return 1024 / client.ttft(server, seed, 1024)


def decode_step(batch: int) -> Measure:
    """Seconds of a step."""
    return lambda client, server, seed: client.decode_step(server, seed, batch)


@dataclass(frozen=True)
class Contest:
    """Ours against vLLM's: what is measured of both, by the cells' names."""

    name: str
    ours: Contender
    theirs: Contender
    cells: dict[Cell, Measure]

    def sides(self) -> Iterator[tuple[str, Contender]]:
        """Both."""
        yield "ours", self.ours
        yield "vllm", self.theirs


CONTESTS = (
    Contest(
        "whole",
        replace(CONTENDERS["mixed-x1"], budgets=BUDGETS),
        replace(CONTENDERS["vllm"], budgets=BUDGETS),
        {
            Cell("whole", "closed_1", "1 client, output tokens/s", least=0.95): closed_loop(1, 12),
            Cell("whole", "closed_8", "8 clients, output tokens/s", least=0.95): closed_loop(8, 6),
            Cell("whole", "closed_32", "32 clients, output tokens/s", least=0.95): closed_loop(32, 4),
            Cell("whole", "ttft_128", "TTFT of 128 tokens alone, ms", most=1.1, factor=1e3): ttft(128),
            Cell("whole", "ttft_1024", "TTFT of 1024 tokens alone, ms", most=1.1, factor=1e3): ttft(1024),
            Cell("whole", "tpot", "TPOT alone, ms", most=1.1, factor=1e3): tpot_alone,
        },
    ),
    Contest(
        "cores",
        replace(CONTENDERS["disaggregated"], budgets=(2048, 512)),
        replace(CONTENDERS["vllm"], name="vllm-one-core", title="vLLM on one core", budgets=(2048, 512), cores="0"),
        {
            Cell("cores", "prompt", "prefill of 1024 tokens, tokens/s", least=0.9): prompt_speed,
            Cell("cores", "prompts", "prefill, saturated, tokens/s", least=0.9): Client.prompt_throughput,
            Cell("cores", "decode_1", "decode step at batch 1, ms", most=1.1, factor=1e3): decode_step(1),
            Cell("cores", "decode_8", "decode step at batch 8, ms", most=1.1, factor=1e3): decode_step(8),
            Cell("cores", "decode_32", "decode step at batch 32, ms", most=1.1, factor=1e3): decode_step(32),
        },
    ),
)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = parser_for(__doc__, RESULTS, PARTS, quick="one round of short loads, one budget")
    parser.add_argument("--real-dir", type=Path, default=REAL, help="where benchmarks.goodput.real wrote to")
    parser.add_argument("--rounds", type=int, default=3)
    options = parse(parser)
    if options.quick:
        options.rounds = 1
    return options


def main() -> int:
    """Measure what is missing and write the table; 1 if something failed to run."""
    unwind_on_sigterm()
    options = parse_arguments()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    store = Store(options.output_dir)
    failed = False
    if not options.report:
        with prepared("benchmarks.goodput.reach", options) as systems:
            session = Session(options, store, systems)
            try:
                session.run()
            except SliceOverError as over:
                say(f"{over}: run it again to go on")
        failed = bool(session.failures)
    contests = {contest.name: (list(contest.cells), contest.ours, contest.theirs) for contest in CONTESTS}
    write_report(options.output_dir, store, contests, Results(Store(options.real_dir)))
    print((options.output_dir / "report.md").read_text())
    return int(failed)


class Session:
    """One invocation's measuring."""

    def __init__(self, options: argparse.Namespace, store: Store, systems: Bench) -> None:
        vocab_size = json.loads((options.model / "config.json").read_text())["vocab_size"]
        self._client = Client(vocab_size, systems.logs / "bench.log", options.quick)
        self._options = options
        self._store = store
        self._systems = systems
        self._slice = Slice(options.minutes, options.max_other_load)
        self.failures: list[str] = []

    def run(self) -> None:
        """Everything that was asked for and is not there yet; raises SliceOverError where it has to end before."""
        parts = self._options.only or PARTS
        for contest in CONTESTS:
            if contest.name in parts:
                self._going_on(contest.name, partial(self._hold, contest))
        if "tails" in parts:
            self._going_on("tails", self._tails)

    def _going_on(self, what: str, work: Callable[[], None]) -> None:
        """A part that fails does not keep the others from being measured."""
        try:
            work()
        except (LoadError, ServerError) as error:
            self.failures.append(what)
            print(f"error in {what}, the others go on: {error}", file=sys.stderr)

    def _hold(self, contest: Contest) -> None:
        self._tune(contest)
        self._compare(contest)

    def _budgets(self, contender: Contender) -> tuple[int, ...]:
        return contender.budgets[:1] if self._options.quick else contender.budgets

    def _tune(self, contest: Contest) -> None:
        """Every cell once with every budget, on both sides."""
        for side, contender in contest.sides():
            budgets = self._budgets(contender)
            for budget in budgets if len(budgets) > 1 else ():
                missing = [cell for cell in contest.cells if tune_name(cell, side, budget) not in self._store]
                if missing:
                    with self._serving(contender, budget) as server:
                        self._warm_up(server)
                        for cell in missing:
                            found = self._measured([server], server, contest.cells[cell], seed=1)
                            self._keep(tune_name(cell, side, budget), found, budget)

    def _compare(self, contest: Contest) -> None:
        """Cells with the same best budgets share a start of both servers; the order is swapped from round to round."""
        together: dict[tuple[int, ...], list[Cell]] = {}
        for cell in contest.cells:
            best = tuple(best_budget(self._store, cell, side, self._budgets(c)) for side, c in contest.sides())
            together.setdefault(best, []).append(cell)
        rounds = range(1, 1 + self._options.rounds)
        for (mine, other), cells in together.items():
            names = [round_name(cell, side, number) for cell in cells for number in rounds for side in ("ours", "vllm")]
            if all(name in self._store for name in names):
                continue
            with self._serving(contest.ours, mine) as ours, self._serving(contest.theirs, other) as theirs:
                for server in (ours, theirs):
                    with alone(server, theirs):
                        self._warm_up(server)
                sides = [("ours", ours, mine), ("vllm", theirs, other)]
                for number in rounds:
                    for cell in cells:
                        for side, server, budget in sides if number % 2 else sides[::-1]:
                            name = round_name(cell, side, number)
                            if name not in self._store:
                                with alone(server, theirs):
                                    measure = contest.cells[cell]
                                    found = self._measured([ours, theirs], server, measure, seed=10 + number)
                                self._keep(name, found, budget)

    def _tails(self) -> None:
        """Gaps between tokens under load and with one client, in turn."""
        quick = self._options.quick
        one: dict[str, int | float] = {"clients": 1, "num_requests": 4 if quick else 30}
        load: dict[str, int | float] = {"rate": TAIL_RATE, "duration": 4 if quick else 40, "warmup": 0 if quick else 5}
        rounds = range(1, 1 + self._options.rounds)
        if all(tail_name(kind, number) in self._store for kind in ("one", "load") for number in rounds):
            return
        contender = CONTENDERS["disaggregated"]
        with self._serving(contender, contender.budgets[0]) as server:
            self._warm_up(server)
            for number in rounds:
                for kind, options in (("one", one), ("load", load)):
                    name = tail_name(kind, number)
                    if name not in self._store:
                        measure = partial(_itl_p99, options=options)
                        found = self._measured([server], server, measure, seed=20 + number)
                        self._keep(name, found, contender.budgets[0])

    def _serving(self, contender: Contender, budget: int) -> AbstractContextManager[Server]:
        self._slice.check()
        say(f"starting {contender.title}, {budget} tokens a step")
        return contender.serving(self._systems, budget)

    def _warm_up(self, server: Server) -> None:
        self._client.ttft(server, 99, prompt_len=1024)
        self._client.decode_step(server, 99, batch=8)

    def _measured(self, up: Sequence[Server], server: Server, measure: Measure, seed: int) -> tuple[float, float]:
        """One figure of ``server``, while those ``up`` are ours to account for, and the cores that others kept busy."""
        return self._slice.measure(partial(measure, self._client, server, seed), *up)

    def _keep(self, name: str, measured: tuple[float, float], budget: int) -> None:
        value, other_load = measured
        date = datetime.now(UTC).isoformat(timespec="seconds")
        kept = {"value": value, "other_load": other_load, "budget": budget, "date": date, "commit": commit()}
        self._store.write(name, kept)
        say(f"{name}: {value:.4g} with {budget} tokens a step")


def _itl_p99(client: Client, server: Server, seed: int, *, options: dict[str, int | float]) -> float:
    return float(summary(client.run(server, seed, {**OPEN_LOOP_LENGTHS, **options}))["itl"]["p99"])


if __name__ == "__main__":
    sys.exit(main())
