"""``distserve launch``: plan, start what was planned, hold it against the prediction, and watch that the plan fits.

The options, and the order of things. Starting and stopping is :mod:`distserve.cluster.serve`'s business, the trial
:mod:`placement.trial`'s, the comparison of loads :mod:`placement.drift`'s.
"""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distserve.bench.errors import BenchError
from distserve.core.errors import ConfigError, DistserveError
from distserve.core.topology import Placement

if TYPE_CHECKING:
    from rich.console import Console

    from distserve.cluster.config import ServeConfig
    from distserve.cluster.serve import Endpoint
    from placement.problem import Problem

_EPILOG = """\b
Examples
\b
  Plan for this machine, start, measure, serve until Ctrl-C:
    distserve profile ./my-llama --output profile.json
    distserve launch service.yaml --profile profile.json
\b
  Start an existing plan in a Ray cluster whose nodes may still be coming:
    distserve plan service.yaml --output plan.yaml
    distserve launch plan.yaml --ray-address auto --wait-for-nodes 600
\b
CONFIG has the keys model, slo, workload and cluster, and engine and serving as `distserve serve` takes them. With
placement: auto, or no such key, the planner decides; with the path of a plan, or pools of instances, they are started.
"""

_LOOK_EVERY = 10.0
_WINDOW_REQUESTS = 500
_SHORTEST_WINDOW, _LONGEST_WINDOW = 60.0, 3600.0


@click.command(epilog=_EPILOG, context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]})
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Requests/s to plan for.  [default: the file's]")
@click.option("--profile", type=click.Path(path_type=Path), help="What `distserve profile` measured on this hardware.")
@click.option("--quick", is_flag=True, help="Plan with shorter runs.")
@click.option("--ray-address", help="Join this Ray cluster (host:port, or auto) in place of a local one.")
@click.option(
    "--wait-for-nodes",
    type=click.FloatRange(0),
    help="Seconds to wait for nodes that a joined cluster lacks for the plan.  [default: 0]",
)
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=int, help="Port to listen on; 0 picks a free one.  [default: 8000]")
@click.option("--api-key", envvar="DISTSERVE_API_KEY", help="Key that clients must send.  [default: none]")
@click.option(
    "--bench/--no-bench", default=True, help="Send the planned load once, and report it beside the prediction."
)
@click.option(
    "--bench-requests",
    type=click.IntRange(10, 100_000),
    default=200,
    show_default=True,
    help="Requests of that load.",
)
@click.option("--exit-after-bench", is_flag=True, help="Stop once the report is printed.")
def launch(config: Path, **options: Any) -> None:
    """Plan for CONFIG, start the plan on Ray, and report what is measured beside what was predicted.

    While it serves, the load is held against the planned one; when they part, it says so, with the command that plans
    again from what was observed. Ctrl-C lets running requests finish first; a second one stops at once.
    """
    from rich.console import Console

    from distserve.cluster.serve import serve

    if options["exit_after_bench"] and not options["bench"]:
        raise click.UsageError("--exit-after-bench stops after the trial, and --no-bench has none: drop one")
    with _errors_for_humans():
        launcher = _prepare(config, options, Console(), Console(stderr=True))
        serve(launcher.config, launcher.messages, launcher.use)


def plan_placement(config: Path, model_dir: Path) -> Placement:  # noqa: ARG001 -- the hook's; CONFIG names it too
    """Answer ``placement: auto`` of ``distserve serve`` (:mod:`distserve.cluster.planner`)."""
    from rich.console import Console

    from placement.config import Overrides, load_problem

    return _plan(config, load_problem(config, Overrides()), Console(stderr=True)).placement


@dataclass(frozen=True)
class _Planned:
    """A placement and the rate it is for."""

    placement: Placement
    rate: float


@dataclass
class _Launcher:
    """What is to be started, and what is done once it runs. ``problem`` None: nothing is known to compare with."""

    file: Path
    config: "ServeConfig"
    problem: "Problem | None"
    rate: float | None
    options: dict[str, Any]
    report: "Console"
    messages: "Console"

    async def use(self, endpoint: "Endpoint") -> None:
        """Try the endpoint, then watch it; returns only if asked to stop after the trial."""
        problem, rate = self.problem, self.rate
        if problem is None or rate is None:
            if self.options["bench"]:
                self.messages.print("no trial: CONFIG has no workload with a rate to send and to compare with")
        elif self.options["bench"]:
            try:
                await self._try(endpoint, problem, rate)
            except DistserveError as error:
                if self.options["exit_after_bench"]:
                    raise
                # A service that runs is not taken down because its trial did not work.
                self.messages.print(f"no trial: {error}", highlight=False, soft_wrap=True)
        if self.options["exit_after_bench"]:
            return
        if problem is not None and rate is not None:
            await self._watch(endpoint, problem, rate)
        await asyncio.Event().wait()

    async def _try(self, endpoint: "Endpoint", problem: "Problem", rate: float) -> None:
        from placement.offered import Offered
        from placement.trial import Trial, as_started, measure, predict, table, verdict
        from simulator.latency.measured import SEVERAL_RANKS, ProfileLatencyModel

        workload = Offered(problem.workload, problem.search.seed).at(rate, 0, self.options["bench_requests"])
        assert workload.arrivals is not None
        seats = tuple(instance.gpus for instance in self.config.instances)
        placement = as_started(seats, endpoint.instances, problem.cluster)
        predicted = await asyncio.to_thread(predict, problem, placement, workload)
        self.messages.print(
            f"sending {len(workload)} requests at {rate:.3g}/s, about {workload.arrivals[-1]:.0f} s", highlight=False
        )
        measured = await measure(endpoint.url, workload, problem.slo, self.config.api_key)
        trial = Trial(rate, predicted, measured)
        self.report.print(table(trial, problem.slo))
        self.report.print(verdict(trial), highlight=False, soft_wrap=True)
        has_several = any(instance.parallel.num_ranks > 1 for instance in endpoint.instances)
        if has_several and isinstance(problem.latency, ProfileLatencyModel):
            self.report.print(SEVERAL_RANKS, highlight=False, soft_wrap=True)

    async def _watch(self, endpoint: "Endpoint", problem: "Problem", rate: float) -> None:
        from distserve.cluster.clock import cluster_time
        from placement.drift import Expected
        from placement.replan import write_replan
        from placement.watch import LoadWatch, describe

        window = min(max(_WINDOW_REQUESTS / rate, _SHORTEST_WINDOW), _LONGEST_WINDOW)
        watch = LoadWatch(Expected.of(problem.workload, rate, window), window)
        endpoint.observe(watch)
        while True:
            await asyncio.sleep(_LOOK_EVERY)
            now = cluster_time()
            findings = watch.look(now)
            if findings is None:
                continue
            self.messages.print(describe(findings, watch.observed(now).span), highlight=False, soft_wrap=True)
            if findings:
                try:
                    advice = write_replan(self.file, watch, now, self.options["profile"])
                except OSError as error:
                    advice = f"nothing can be written beside {self.file} ({error.strerror}): collect a trace elsewhere"
                self.messages.print(f"To plan again from what was observed: {advice}", highlight=False, soft_wrap=True)


def _prepare(file: Path, options: dict[str, Any], report: "Console", messages: "Console") -> _Launcher:
    """Check everything, plan if it is asked for, and show what will be started."""
    from distserve.cluster.config import load_config
    from distserve.cluster.yaml_file import read_yaml
    from distserve.demo import model_dir
    from placement.config import Overrides, check_unplanned, load_problem
    from placement.offered import Offered
    from placement.planfile import dtype_name

    data, _ = read_yaml(file)
    problem: Problem | None = None
    if {"slo", "workload", "cluster"} <= data.keys():
        problem = load_problem(
            file, Overrides(rate=options["rate"], profile=options["profile"], quick=options["quick"])
        )
    else:
        check_unplanned(file)
    planned: list[_Planned] = []

    def planner(config: Path, model: Path) -> Placement:  # noqa: ARG001 -- the hook's
        if problem is None:
            missing = ", ".join(sorted({"slo", "workload", "cluster"} - data.keys()))
            raise ConfigError(f"{config}: planning needs the sections slo, workload and cluster; missing: {missing}")
        planned.append(_plan(config, problem, messages, report))
        return planned[0].placement

    flags = {
        "serving.host": options["host"],
        "serving.port": options["port"],
        "serving.api_key": options["api_key"],
        "serving.ray_address": options["ray_address"],
        "serving.node_patience": options["wait_for_nodes"],
        "engine.profile": options["profile"] and options["profile"].resolve(),
        "placement": "auto" if data.get("placement") is None else None,
        # What a plan or prediction is made with, and the engine's default need not be.
        "engine.dtype": dtype_name(problem.model) if problem and "dtype" not in (data.get("engine") or {}) else None,
    }
    config = load_config(file, flags, model_dir(), planner)
    if planned:
        rate: float | None = planned[0].rate
    else:
        rate = None
        if problem is not None:
            rate = problem.rate or (data.get("prediction") or {}).get("rate") or Offered(problem.workload).natural_rate
        _show(config, data.get("prediction") or {}, report)
    if options["exit_after_bench"] and (problem is None or rate is None):
        raise ConfigError(
            f"--exit-after-bench: {file} has no load to send and to compare with; it takes the sections slo, workload "
            "(with a rate, or --rate) and cluster"
        )
    return _Launcher(file, config, problem, rate, options, report, messages)


def _plan(file: Path, problem: "Problem", messages: "Console", report: "Console | None" = None) -> _Planned:
    """Search, with progress, and show the plan."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from placement.report import print_report
    from placement.search import find_plan

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=messages, transient=True, disable=not messages.is_terminal) as bar:
        task = bar.add_task(f"planning for {file.name}", total=None)

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total or None)

        found = find_plan(problem, show)
    if report is not None:
        print_report(report, found, None)
    return _Planned(found.chosen.placement, found.chosen.point.rate)


def _show(config: "ServeConfig", prediction: dict[str, Any], console: "Console") -> None:
    """The instances of a placement that was not planned just now, and what was predicted of it when it was."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=f"Placement, instances: {len(config.instances)}", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("role", "shape", "node: GPUs"):
        table.add_column(heading)
    for instance in config.instances:
        nodes: dict[int, list[int]] = {}
        for gpu in instance.gpus:
            nodes.setdefault(gpu.node, []).append(gpu.index)
        seats = "  ".join(f"{node}: {','.join(map(str, gpus))}" for node, gpus in nodes.items())
        shape = f"tp {instance.parallel.tp} x pp {instance.parallel.pp}"
        table.add_row(instance.role.value, shape, seats or "any")
    console.print(table)
    attainment, rate = (prediction.get("attainment") or {}).get("estimate"), prediction.get("rate")
    if isinstance(attainment, float) and isinstance(rate, float):
        source = prediction.get("latency_source", "an unknown source")
        console.print(
            f"planned for {rate:.4g} requests/s with a predicted attainment of {attainment:.1%}, "
            f"step times from {source}",
            highlight=False,
            soft_wrap=True,
        )


@contextmanager
def _errors_for_humans() -> Iterator[None]:
    """Log warnings to standard error, and end with a sentence where the user is at fault."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        yield
    except (DistserveError, BenchError) as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None
