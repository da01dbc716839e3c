"""From a configuration file and command-line flags to the planner's problem; every mistake is said with its place.

The file is the one that ``distserve serve`` and ``launch`` take. The planner reads model, slo, workload and cluster, of
``engine`` what limits an instance, and of ``placement`` the pools, if it names any, as a rival to its own choice.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from distserve.cluster.config import ConfigFile, EngineSection
from distserve.cluster.placement_section import PlacementSection
from distserve.cluster.yaml_file import explain, read_yaml
from distserve.core.config import SLO, ParallelConfig, Role
from distserve.core.errors import ConfigError
from distserve.core.topology import ClusterSpec
from placement.candidates import Candidate
from placement.offered import Offered
from placement.problem import EngineLimits, Problem, SearchLimits
from placement.sections import ClusterSection, WorkloadSection
from placement.shapes import find_shapes
from simulator.latency.analytic import AnalyticModel
from simulator.latency.distserve_profile import DistServeProfile
from simulator.latency.interface import LatencyModel
from simulator.latency.measured import ProfileLatencyModel
from simulator.latency.shape import ModelShape
from simulator.model import Delays

_QUICK = SearchLimits(num_finalists=2, tolerance=0.06, num_requests=150, max_requests=1500)
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


class PlanningFile(ConfigFile):
    """The whole file, with the sections that the planner cannot do without."""

    workload: WorkloadSection  # type: ignore[assignment]
    cluster: ClusterSection  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class Overrides:
    """What flags say beside the file; None is not given."""

    rate: float | None = None
    latency: str | None = None
    profile: Path | None = None
    seed: int = 0
    num_workers: int | None = None
    quick: bool = False


def load_problem(path: Path, overrides: Overrides) -> Problem:
    """Read and check the file at ``path``.

    Raises ConfigError and WorkloadError, with the key and line of a mistake and what would be valid.
    """
    file = _read(path)
    assert file.slo is not None
    cluster = file.cluster.spec()
    model = _model(file, path.parent)
    latency = _latency(file.cluster, overrides, model, cluster, path.parent)
    search = replace(
        _QUICK if overrides.quick else SearchLimits(), seed=overrides.seed, num_workers=overrides.num_workers
    )
    problem = Problem(
        model=model,
        slo=SLO(file.slo.ttft, file.slo.tpot, file.slo.attainment),
        workload=file.workload.spec(path.parent),
        rate=overrides.rate if overrides.rate is not None else file.workload.arrivals.rate,
        cluster=cluster,
        latency=latency,
        limits=_limits(file.engine, file.cluster.gpu_memory),
        search=search,
    )
    return replace(problem, delays=_delays(problem))


def given_candidate(path: Path, problem: Problem) -> Candidate | None:
    """The pools that the file's ``placement`` names, as a rival to the planner's choice; None: it names none.

    Raises ConfigError if an instance of such a shape cannot be.
    """
    section = _read(path).placement
    if not isinstance(section, PlacementSection):
        return None
    section.instances()
    pools = {role: getattr(section, role) for role in Role if getattr(section, role)}
    shapes, refused = find_shapes(problem, Offered(problem.workload, problem.search.seed))
    found = []
    for role, pool in pools.items():
        if not pool.instances:
            continue
        parallel = ParallelConfig(pool.tp, pool.pp)
        problem.model.check(parallel)
        shape = next((shape for shape in shapes if (shape.role, shape.parallel) == (role, parallel)), None)
        if shape is None:
            reasons = [refusal.reason for refusal in refused if refusal.parallel == parallel]
            reason = reasons[0] if reasons else "it is wider than a node or the cluster"
            raise ConfigError(f"placement.{role}: tp {pool.tp} x pp {pool.pp} cannot be: {reason}")
        found.append((shape, pool.instances))
    return Candidate(tuple(found))


def _read(path: Path) -> PlanningFile:
    data, lines = read_yaml(path)
    for section in ("slo", "workload", "cluster"):
        if not isinstance(data.get(section), dict):
            raise ConfigError(f"{path}: planning needs the section {section}, {_EXAMPLES[section]}")
    try:
        return PlanningFile.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error, path, lines, {}, PlanningFile)) from error


_EXAMPLES = {
    "slo": "such as slo: {ttft: 0.4, tpot: 0.04, attainment: 0.9}",
    "workload": "such as workload: {trace: azure2023_conv.csv}, or prompt, output and arrivals",
    "cluster": "such as cluster: {gpu: h100-sxm, nodes: 4, gpus_per_node: 8, intra_node_bandwidth: 450e9, "
    "inter_node_bandwidth: 50e9}",
}


def _model(file: PlanningFile, base: Path) -> ModelShape:
    """The model's shape: a directory or config.json as given or relative to the file; the demo model if unsaid."""
    if file.model is None:
        from distserve.demo import model_dir

        path = model_dir()
    else:
        path = Path(file.model)
        if not path.exists() and (base / path).exists():
            path = base / path
    shape = ModelShape.load(path)
    if "dtype" in file.engine.model_fields_set:
        shape = replace(shape, dtype_bytes=_DTYPE_BYTES[file.engine.dtype])
    return shape


def _latency(
    section: ClusterSection, overrides: Overrides, model: ModelShape, cluster: ClusterSpec, base: Path
) -> LatencyModel:
    """The source of step times: a flag wins over the file, and a profile that is named is meant."""
    path = overrides.profile
    if path is None and section.profile is not None:
        path = section.profile if section.profile.exists() else base / section.profile
    kind = overrides.latency or section.latency or ("profile" if path is not None else "analytic")
    if kind == "analytic":
        return AnalyticModel(model, cluster)
    if path is None:
        hint = "`distserve profile MODEL --output FILE` makes one" if kind == "profile" else "DistServe's JSON of fits"
        raise ConfigError(f"step times by {kind} need --profile FILE: {hint}")
    if kind == "profile":
        return ProfileLatencyModel.read(path)
    if cluster.gpu != "a100-80g-sxm":
        raise ConfigError(f"DistServe's fits are of a100-80g-sxm, the cluster has {cluster.gpu}")
    return DistServeProfile.load(path, model.name)


def _limits(engine: EngineSection, gpu_memory: float | None) -> EngineLimits:
    """What the file says of the engine; what it does not say is the planner's to choose."""
    said = engine.model_fields_set
    limits = EngineLimits(block_size=engine.block_size)
    if "max_batch_tokens" in said:
        limits = replace(
            limits, prefill_batch_tokens=engine.max_batch_tokens, mixed_batch_tokens=engine.max_batch_tokens
        )
    if "max_batch_size" in said:
        limits = replace(limits, max_batch_size=engine.max_batch_size)
    if engine.max_model_len is not None:
        limits = replace(limits, max_model_len=engine.max_model_len)
    if engine.kv_tokens is not None:
        limits = replace(limits, kv_tokens=engine.kv_tokens)
    if gpu_memory is not None:
        limits = replace(limits, memory_bytes=int(gpu_memory))
    return limits


def _delays(problem: Problem) -> Delays:
    """As measured, where a profile has what a cluster adds to the steps."""
    latency = problem.latency
    if not isinstance(latency, ProfileLatencyModel) or latency.profile.cluster is None:
        return Delays()
    prompts, _ = Offered(problem.workload, problem.search.seed).sample
    names = tuple(f"{role}-{number}" for role in Role for number in range(problem.cluster.num_gpus))
    return latency.delays(names, float(prompts.mean()))
