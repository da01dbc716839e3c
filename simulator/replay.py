"""A workload, a placement and the figures to simulate them with, read from files and flags; and the run itself."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from distserve.bench.arrivals import Gamma
from distserve.bench.workload import Workload, WorkloadSpec
from distserve.cluster.placement_section import PlacementSection
from distserve.cluster.yaml_file import beside
from distserve.core.config import SLO
from distserve.core.errors import ConfigError
from distserve.core.latency import StepShape
from distserve.core.router import DEFAULT_SLO
from distserve.core.topology import ClusterSpec, Placement
from simulator.inputs import SimulationFile, most_kv, read_file, read_latency, read_model
from simulator.latency.gpus import find_gpu
from simulator.latency.interface import LatencyModel
from simulator.latency.measured import SEVERAL_RANKS, ProfileLatencyModel
from simulator.load import BatchRecorder
from simulator.model import ClusterModel, Delays
from simulator.perfetto import PerfettoRecorder
from simulator.planfile import Limits, Planned, check_cluster, deployment, on_one_host, place, read_placement
from simulator.recorder import Recorder
from simulator.results import Simulation
from simulator.simulation import Fault, FaultKind, simulate

_DEFAULT_REQUESTS = 2000


class _All:
    """Tells several recorders the same."""

    def __init__(self, recorders: Sequence[Recorder]) -> None:
        self._recorders = recorders

    def on_step(self, instance_id: str, stage: int, start: float, end: float, shape: StepShape) -> None:
        for recorder in self._recorders:
            recorder.on_step(instance_id, stage, start, end, shape)

    def on_pull(
        self, request_id: str, source_id: str, puller_id: str, start: float, end: float, num_bytes: int
    ) -> None:
        for recorder in self._recorders:
            recorder.on_pull(request_id, source_id, puller_id, start, end, num_bytes)

    def on_links(self, start: float, end: float, num_bytes: Sequence[float]) -> None:
        for recorder in self._recorders:
            recorder.on_links(start, end, num_bytes)


@dataclass
class Replay:
    """One run to be made. ``facts`` say in words and figures what is simulated."""

    model: ClusterModel
    placement: Placement
    workload: Workload
    slo: SLO | None
    faults: tuple[Fault, ...]
    facts: dict[str, Any]
    batches: BatchRecorder | None = None
    _simulation: Simulation | None = field(default=None, init=False)

    def run(self, on_progress: Callable[[int], None], *, with_batches: bool = False, trace: Path | None = None) -> None:
        """Simulate; ``with_batches`` keeps batch sizes over time, ``trace`` is where a Chrome trace goes."""
        recorders: list[Recorder] = []
        if with_batches:
            self.batches = BatchRecorder()
            recorders.append(self.batches)
        if trace is None:
            self._simulation = self._simulate(recorders, on_progress)
            return
        with trace.open("w", encoding="utf-8") as file:
            perfetto = PerfettoRecorder(file, self.model)
            self._simulation = self._simulate([*recorders, perfetto], on_progress)
            perfetto.close()

    def _simulate(self, recorders: Sequence[Recorder], on_progress: Callable[[int], None]) -> Simulation:
        recorder = None if not recorders else recorders[0] if len(recorders) == 1 else _All(recorders)
        return simulate(self.model, self.workload, faults=self.faults, recorder=recorder, on_progress=on_progress)

    @property
    def simulation(self) -> Simulation:
        """What came of :meth:`run`."""
        assert self._simulation is not None, "run first"
        return self._simulation


def prepare(config: Path, options: Mapping[str, Any]) -> Replay:
    """Read the files; ``options`` are the command's, by name.

    Raises ConfigError and WorkloadError, with the key, line or flag of a mistake and what would be valid.
    """
    file = read_file(config, SimulationFile, sections=("workload", "cluster"), purpose="simulating")
    base = config.parent
    cluster = file.cluster.spec()
    planned = _planned(file, config, options["placement"], cluster)
    shape = read_model(file.model, file.engine, base, cluster.gpu)
    latency = read_latency(
        file.cluster, shape, cluster, base, kind=options["latency"], profile=options["profile"], name=file.model
    )
    gpu = find_gpu(cluster.gpu)
    if file.cluster.gpu_memory is not None:
        gpu = replace(gpu, memory_bytes=int(file.cluster.gpu_memory))
    limits = Limits(file.engine, gpu, file.engine.token_budget(base), most_kv(file.cluster, file.engine, shape))
    placement = place(planned.section, cluster, shape, limits)
    spec = _workload_spec(file, base, options)
    rate = options["rate"] or file.workload.arrivals.rate
    if rate is None and isinstance(spec.arrivals, Gamma):
        rate = planned.rate
        if rate is None:
            raise ConfigError("the workload names no rate: give --rate, or workload: {arrivals: {rate: ...}}")
    workload = spec.at(rate)
    slo = None if file.slo is None else SLO(file.slo.ttft, file.slo.tpot, file.slo.attainment)
    model = deployment(placement, latency, shape, _delays(latency, placement, workload), slo or DEFAULT_SLO)
    model = on_one_host(model, latency, placement)
    facts = {
        "model": shape.name,
        "cluster": f"{cluster.num_nodes} x {cluster.gpus_per_node} {cluster.gpu}",
        "placement": _describe(placement),
        "num_gpus": placement.num_gpus,
        "latency_source": latency.source,
        "workload": _describe_workload(file, spec, rate, workload),
        "rate": rate,
        "seed": options["seed"],
        "warmup": options["warmup"],
        "faults": list(options["faults"]),
        "notes": _notes(spec, workload, model),
    }
    return Replay(model, placement, workload, slo, _faults(options["faults"], placement), facts)


def _planned(file: SimulationFile, config: Path, given: Path | None, cluster: ClusterSpec) -> Planned:
    """The placement of ``--placement``, of the file, or of the plan that the file names."""
    if given is None and isinstance(file.placement, PlacementSection):
        return Planned(file.placement, cluster)
    if given is None and isinstance(file.placement, str) and file.placement != "auto":
        given = beside(Path(file.placement), config.parent)
    if given is None:
        raise ConfigError(
            f"{config} names no instances to simulate: give --placement FILE (`distserve plan {config} --output FILE` "
            "finds one), or write placement: {prefill: {instances: 1, tp: 1}, decode: {instances: 1, tp: 1}}"
        )
    planned = read_placement(given)
    check_cluster(planned.cluster, cluster, given)
    return planned


def _workload_spec(file: SimulationFile, base: Path, options: Mapping[str, Any]) -> WorkloadSpec:
    spec = file.workload.spec(base)
    num_requests, duration = options["requests"], options["duration"]
    if isinstance(spec.arrivals, Gamma) and num_requests is None and duration is None:
        num_requests = len(spec.trace) if spec.trace is not None else _DEFAULT_REQUESTS
    return replace(spec, num_requests=num_requests, duration=duration, seed=options["seed"])


def _delays(latency: LatencyModel, placement: Placement, workload: Workload) -> Delays:
    """As measured, where a profile has what a cluster adds to the steps."""
    if not isinstance(latency, ProfileLatencyModel) or latency.profile.cluster is None:
        return Delays()
    names = tuple(instance.spec.instance_id for instance in placement.instances)
    return latency.delays(names, float(workload.prompt_lens.mean()))


def _faults(texts: Sequence[str], placement: Placement) -> tuple[Fault, ...]:
    known = [instance.spec.instance_id for instance in placement.instances]
    faults = []
    for text in texts:
        parts = text.split(":")
        kinds = ", ".join(FaultKind)
        if len(parts) != 3:
            raise ConfigError(
                f"--fault {text!r}: write TIME:KIND:INSTANCE, such as 60:loss:{known[-1]}; kinds: {kinds}"
            )
        time, kind, instance_id = parts
        try:
            seconds = float(time)
        except ValueError:
            raise ConfigError(f"--fault {text!r}: the time must be seconds, not {time!r}") from None
        if not 0 <= seconds < float("inf"):
            raise ConfigError(f"--fault {text!r}: the time must be 0 or more seconds")
        if kind not in set(FaultKind):
            raise ConfigError(f"--fault {text!r}: {kind!r} is no kind of fault; there are {kinds}")
        if instance_id not in known:
            raise ConfigError(f"--fault {text!r}: no instance is called {instance_id!r}; there are {', '.join(known)}")
        faults.append(Fault(seconds, FaultKind(kind), instance_id))
    _check_sequence(faults)
    return tuple(faults)


def _check_sequence(faults: Sequence[Fault]) -> None:
    """Raise ConfigError if something is to befall an instance that is not there, or one is to start that is."""
    is_there: dict[str, bool] = {}
    for fault in sorted(faults, key=lambda fault: fault.time):
        name, is_start = fault.instance_id, fault.kind is FaultKind.START
        if is_there.get(name, not is_start) == is_start:
            state = "runs by then, and cannot start" if is_start else "is lost by then: only start can follow"
            raise ConfigError(f"--fault {fault.time:g}:{fault.kind}:{name}: {name} {state}")
        is_there[name] = fault.kind is not FaultKind.LOSS


def _describe(placement: Placement) -> str:
    shapes = Counter((i.spec.role, i.spec.parallel.tp, i.spec.parallel.pp) for i in placement.instances)
    pools = (f"{count} {role} TP{tp} PP{pp}" for (role, tp, pp), count in shapes.items())
    return f"{', '.join(pools)} ({placement.num_gpus} GPUs)"


def _describe_workload(file: SimulationFile, spec: WorkloadSpec, rate: float | None, workload: Workload) -> str:
    lengths = f"mean {workload.prompt_lens.mean():,.0f} in, {workload.output_lens.mean():,.0f} out"
    source = f"trace {file.workload.trace.name}" if file.workload.trace is not None else "drawn lengths"
    if isinstance(spec.arrivals, Gamma):
        arrivals = f"{rate:g} requests/s, gaps of CV {spec.arrivals.cv:g}"
    else:
        arrivals = "its own times" if rate is None else f"its own times scaled to {rate:g} requests/s"
    return f"{len(workload):,} requests, {source} ({lengths} tokens), {arrivals}"


def _notes(spec: WorkloadSpec, workload: Workload, model: ClusterModel) -> list[str]:
    notes = []
    if model.host is not None:
        notes.append(
            f"the instances share {model.host.num_cores:g} cores with client, API and router; plots and traces show "
            "each step as long as it takes alone"
        )
        if any(instance.spec.parallel.num_ranks > 1 for instance in model.instances):
            notes.append(SEVERAL_RANKS)
    if spec.trace is not None and spec.trace.note:
        notes.append(spec.trace.note)
    if workload.length_factor != 1.0:
        notes.append(f"all lengths were multiplied by {workload.length_factor:.4g}")
    caches = any(instance.spec.scheduler.prefix_caching for instance in model.instances)
    if workload.prefix_blocks is not None and not caches:
        notes.append(
            "the trace's shared prefixes are not used: every prompt is computed whole (engine: prefix_caching)"
        )
    return notes
