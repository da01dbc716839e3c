"""Holds a prediction against the running deployment: the same requests, simulated and sent.

The requests are drawn once from the planned workload. They are simulated on the instances as they were started, and
sent to the endpoint by ``distserve bench`` in a process of its own, so that the client does not take turns with the
server. Both start empty, so both see the same ramp; the plan's own prediction is of a steady state.
"""

import asyncio
import json
import os
import signal
import sys
import tempfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.table import Table

from distserve.bench.metrics import wilson_interval
from distserve.bench.workload import Workload
from distserve.core.config import SLO, InstanceSpec
from distserve.core.errors import ConfigError, DistserveError
from distserve.core.topology import ClusterSpec, Gpu, PlacedInstance, Placement
from placement.deployment import joint_model
from placement.plan import Interval, Percentiles
from placement.problem import Problem
from placement.trace_file import write_trace
from placement.words import milliseconds
from simulator.planfile import on_one_host
from simulator.results import Timelines
from simulator.simulation import simulate

_PATIENCE = 60.0
"""Seconds after its arrival at which a request of a trial is given up."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What became of the requests of one run: attainment of both bounds, and latencies of those answered."""

    num_requests: int
    attainment: Interval
    ttft: Percentiles
    tpot: Percentiles


@dataclass(frozen=True, slots=True)
class Trial:
    """The same requests at ``rate`` requests/s, predicted and measured."""

    rate: float
    predicted: Figures
    measured: Figures


def as_started(gpus: tuple[tuple[Gpu, ...], ...], specs: tuple[InstanceSpec, ...], cluster: ClusterSpec) -> Placement:
    """The placement of running instances; those without GPUs in the plan take the cluster's in order.

    Raises:
        ConfigError: the cluster has fewer than they need.
    """
    seats = iter([Gpu(node, index) for node in range(cluster.num_nodes) for index in range(cluster.gpus_per_node)])
    placed = []
    for planned, spec in zip(gpus, specs, strict=True):
        taken = planned or tuple(islice(seats, spec.parallel.num_ranks))
        placed.append(PlacedInstance(spec, taken))
    placement = Placement(cluster, tuple(placed))
    placement.check()
    return placement


def predict(problem: Problem, placement: Placement, workload: Workload) -> Figures:
    """Simulate ``workload`` on ``placement``."""
    model = joint_model(problem, placement)
    model = on_one_host(model, problem.latency, placement)
    return figures_of(simulate(model, workload).timelines, problem.slo)


def figures_of(timelines: Timelines, slo: SLO) -> Figures:
    """The figures of a simulated run, counted as ``distserve bench`` counts."""
    met = timelines.meets(slo)
    served = timelines.status == 200
    low, high = wilson_interval(int(met.sum()), len(met))
    return Figures(
        len(met),
        Interval(float(met.mean()), low, high),
        _percentiles(timelines.ttft[served]),
        _percentiles(timelines.tpot[served & (timelines.output_tokens > 1)]),
    )


async def measure(url: str, workload: Workload, slo: SLO, api_key: str | None) -> Figures:
    """Send ``workload`` to the endpoint at ``url``.

    Raises:
        DistserveError: it could not be measured; says what the benchmark said.
    """
    if workload.arrivals is None:
        raise ConfigError("a trial needs arrivals over time: closed-loop load has none")
    with tempfile.TemporaryDirectory(prefix="distserve-trial-") as directory:
        trace, result = Path(directory, "requests.csv"), Path(directory, "result.json")
        write_trace(trace, zip(workload.arrivals, workload.prompt_lens, workload.output_lens, strict=True))
        command = [sys.executable, "-m", "distserve.bench", url, "--trace", str(trace), "--output", str(result)]
        command += ["--slo-ttft", repr(slo.ttft), "--slo-tpot", repr(slo.tpot), "--attainment", repr(slo.attainment)]
        command += ["--timeout", repr(_PATIENCE)]
        environment = dict(os.environ) if api_key is None else os.environ | {"OPENAI_API_KEY": api_key}
        child = await asyncio.create_subprocess_exec(
            *command,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is the launcher's to handle
        )
        try:
            output, _ = await child.communicate()
        finally:
            if child.returncode is None:
                child.send_signal(signal.SIGKILL)
                await child.wait()
        return _read_result(result, output.decode().strip())


def _read_result(path: Path, said: str) -> Figures:
    if not path.is_file():
        raise DistserveError(f"the benchmark of the running deployment failed: {said}")
    document = json.loads(path.read_text(encoding="utf-8"))
    summary = document["runs"][0]["summary"]
    if document["error"] or not summary["num_ok"]:
        raise DistserveError(
            f"the benchmark of the running deployment failed: {document['error'] or summary['errors']}"
        )
    return _measured(summary)


def table(trial: Trial, slo: SLO) -> Table:
    """Predicted beside measured."""
    shown = Table(
        title=f"{trial.measured.num_requests} requests at {trial.rate:.3g}/s, TTFT {slo.ttft:g} s, TPOT {slo.tpot:g} s",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    shown.add_column("")
    for heading in ("predicted", "measured", "apart"):
        shown.add_column(heading, justify="right", no_wrap=True)
    one, other = trial.predicted, trial.measured
    points = 100 * (other.attainment.estimate - one.attainment.estimate)
    shown.add_row("attainment", _share(one.attainment), _share(other.attainment), f"{points:+.1f} points")
    for name, mine, theirs in (("TTFT", one.ttft, other.ttft), ("TPOT", one.tpot, other.tpot)):
        for label in ("p50", "p90", "p99"):
            a, b = getattr(mine, label), getattr(theirs, label)
            apart = f"{b / a - 1:+.0%}" if np.isfinite(a) and a > 0 and np.isfinite(b) else "-"
            shown.add_row(f"{name} {label}, ms", milliseconds(a), milliseconds(b), apart)
    return shown


def verdict(trial: Trial) -> str:
    """Whether measurement and prediction agree, as far as so many requests can tell."""
    one, other = trial.predicted.attainment, trial.measured.attainment
    if one.low <= other.estimate <= one.high or other.low <= one.estimate <= other.high:
        return "measured attainment agrees with the prediction, as far as so many requests can tell"
    better = "above" if other.estimate > one.estimate else "below"
    return (
        f"measured attainment is {better} the prediction by more than chance: was the profile taken on this machine, "
        "with nothing else running on it, as nothing else runs now?"
    )


def _share(interval: Interval) -> str:
    return f"{interval.estimate:.1%} ({interval.low:.0%} to {interval.high:.0%})"


def _measured(summary: dict[str, Any]) -> Figures:
    met = summary["attainment"]
    return Figures(
        summary["num_offered"],
        Interval(met["both"], met["low"], met["high"]),
        *(
            Percentiles(*(float("nan") if summary[name][key] is None else summary[name][key] for key in _PERCENTILES))
            for name in ("ttft", "tpot")
        ),
    )


_PERCENTILES = ("mean", "p50", "p90", "p99")


def _percentiles(values: NDArray[np.float64]) -> Percentiles:
    if not len(values):
        return Percentiles(*(float("nan"),) * 4)
    p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
    return Percentiles(float(values.mean()), p50, p90, p99)
