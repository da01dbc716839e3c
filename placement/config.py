"""From a configuration file and command-line flags to the planner's problem; every mistake is said with its place.

The file is the one that ``distserve serve`` and ``launch`` take. The planner reads model, slo, workload, cluster and
search, of ``engine`` what limits an instance, and of ``placement`` the pools, if it names any, as a rival to its own
choice.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from distserve.cluster.config import ConfigFile
from distserve.cluster.placement_section import PlacementSection, PoolSection
from distserve.core.config import SLO, ParallelConfig, Role
from distserve.core.errors import ConfigError
from placement.candidates import Candidate, spans
from placement.offered import Offered
from placement.problem import EngineLimits, Problem, SearchLimits
from placement.shapes import find_shapes
from simulator.inputs import SimulationFile, most_kv, read_file, read_latency, read_model
from simulator.latency.measured import ProfileLatencyModel
from simulator.latency.shape import ModelShape
from simulator.model import Delays
from simulator.sections import WorkloadSection

_QUICK = SearchLimits(num_finalists=2, tolerance=0.06, num_requests=150, max_requests=1500)


class SearchSection(BaseModel):
    """``search``: what else the planner looks at.

    ``hybrid``: prefill instances beside mixed ones, made of the shapes that lead in the search for the other kinds.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    hybrid: bool = True


class PlanningFile(SimulationFile):
    """The whole file, with the planner's own section checked."""

    search: SearchSection = SearchSection()  # type: ignore[assignment]


class _UnplannedFile(ConfigFile):
    """A file that nothing is planned from; what it says to the planner is checked all the same."""

    workload: WorkloadSection | None = None  # type: ignore[assignment]
    search: SearchSection = SearchSection()  # type: ignore[assignment]


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
    model = read_model(file.model, file.engine, path.parent, cluster.gpu)
    latency = read_latency(
        file.cluster,
        model,
        cluster,
        path.parent,
        kind=overrides.latency,
        profile=overrides.profile,
        name=file.model,
    )
    search = replace(
        _QUICK if overrides.quick else SearchLimits(),
        policies=(file.engine.mixed_policy,),
        hybrid=file.search.hybrid,
        seed=overrides.seed,
        num_workers=overrides.num_workers,
    )
    problem = Problem(
        model=model,
        slo=SLO(file.slo.ttft, file.slo.tpot, file.slo.attainment),
        workload=file.workload.spec(path.parent),
        rate=overrides.rate if overrides.rate is not None else file.workload.arrivals.rate,
        cluster=cluster,
        latency=latency,
        limits=_limits(file, model),
        search=search,
    )
    return replace(problem, delays=_delays(problem))


def check_unplanned(path: Path) -> None:
    """Raise ConfigError if a section of the file at ``path`` has mistakes, though nothing is planned from it."""
    read_file(path, _UnplannedFile, sections=(), purpose="launching")


def given_candidate(path: Path, problem: Problem) -> Candidate | None:
    """The pools that the file's ``placement`` names, as a rival to the planner's choice; None: it names none.

    Raises ConfigError if an instance of such a shape cannot be.
    """
    section = _read(path).placement
    if not isinstance(section, PlacementSection):
        return None
    section.instances()
    pools = {role: getattr(section, role) for role in Role if getattr(section, role)}
    offered = Offered(problem.workload, problem.search.seed)
    found = []
    for role, pool in pools.items():
        if not pool.instances:
            continue
        shapes, refused = find_shapes(replace(problem, limits=_limits_of(pool, problem.limits)), offered)
        parallel = ParallelConfig(pool.tp, pool.pp)
        problem.model.check(parallel)
        shape = next((shape for shape in shapes if (shape.role, shape.parallel) == (role, parallel)), None)
        if shape is None:
            ours = [refusal for refusal in refused if refusal.parallel == parallel and refusal.role in {None, role}]
            if ours:
                reason = ours[0].reason
            elif problem.model.num_layers % pool.pp:
                reason = f"{problem.model.num_layers} layers are planned in equal stages"
            elif pool.pp > problem.search.max_pp:
                reason = f"up to {problem.search.max_pp} stages are planned"
            else:
                reason = "it is wider than a node or the cluster"
            raise ConfigError(f"placement.{role}: tp {pool.tp} x pp {pool.pp} cannot be: {reason}")
        found.append((shape, pool.instances))
    # Side by side on the same nodes where that is possible, as DistServe's Algorithm 2 seats such pairs.
    span = spans(problem, found[0][0], found[1][0])[-1] if len(found) == 2 else 1
    return Candidate(tuple(found), span)


def _limits_of(pool: PoolSection, limits: EngineLimits) -> EngineLimits:
    """``limits``, and what the pool says of its own instances in their place."""
    return replace(
        limits,
        kv_tokens=pool.kv_tokens or limits.kv_tokens,
        prefill_batch_tokens=pool.max_batch_tokens or limits.prefill_batch_tokens,
        mixed_batch_tokens=pool.max_batch_tokens or limits.mixed_batch_tokens,
        max_batch_size=pool.max_batch_size or limits.max_batch_size,
    )


def _read(path: Path) -> PlanningFile:
    return read_file(path, PlanningFile, sections=("slo", "workload", "cluster"), purpose="planning")


def _limits(file: SimulationFile, model: ModelShape) -> EngineLimits:
    """What the file says of the engine; what it does not say is the planner's to choose."""
    engine, gpu_memory = file.engine, file.cluster.gpu_memory
    said = engine.model_fields_set
    limits = EngineLimits(block_size=engine.block_size)
    if "max_batch_tokens" in said:
        limits = replace(
            limits, prefill_batch_tokens=engine.max_batch_tokens, mixed_batch_tokens=engine.max_batch_tokens
        )
        # What is not said must not contradict what is: a mixed step has room for a token of every sequence.
        limits = replace(limits, max_batch_size=min(limits.max_batch_size, engine.max_batch_tokens))
    if "max_batch_size" in said:
        limits = replace(limits, max_batch_size=engine.max_batch_size)
    if engine.max_model_len is not None:
        limits = replace(limits, max_model_len=engine.max_model_len)
    if engine.kv_tokens is not None:
        limits = replace(limits, kv_tokens=engine.kv_tokens)
    if engine.kv_memory is not None:
        limits = replace(limits, kv_memory=int(engine.kv_memory))
    limits = replace(limits, kv_most=most_kv(file.cluster, engine, model))
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
