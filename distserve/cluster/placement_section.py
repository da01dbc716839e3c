"""The ``placement`` section of a configuration, and the plan files it can name.

A plan file is a configuration too: the section with every instance's GPUs, beside the cluster, objective and workload
it was planned for and what was predicted. Serving needs the placement and the cluster; the rest is for reports.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distserve.cluster.seats import PlannedLimits, WantedInstance, check_seats
from distserve.core.config import ParallelConfig, Role
from distserve.core.errors import ConfigError
from distserve.core.topology import ClusterSpec, Gpu

Count = Annotated[int, Field(ge=0, le=10_000)]
Degree = Annotated[int, Field(ge=1, le=1024)]
Positive = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
Bandwidth = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class PoolSection(BaseModel):
    """``placement.prefill`` and its like: a pool of equal instances.

    ``gpus`` has one list of ``[node, index]`` per instance, shard ``t`` of stage ``s`` at place ``s * tp + t``. The
    limits are those a plan was simulated with; where it says none, the section ``engine`` does.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    instances: Count = 1
    tp: Degree = 1
    pp: Degree = 1
    gpus: list[list[tuple[Index, Index]]] | None = None
    max_batch_tokens: Positive | None = None
    max_batch_size: Positive | None = None
    kv_tokens: Positive | None = None


class PlacementSection(BaseModel):
    """``placement``: the pools by role; without mixed instances, one prefill and one decode instance if unsaid.

    Prefill beside mixed instances: a hybrid, see docs/hybrid.md.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prefill: PoolSection | None = None
    decode: PoolSection | None = None
    mixed: PoolSection | None = None

    def instances(self) -> tuple[WantedInstance, ...]:
        """The instances, pool by pool.

        Raises:
            ConfigError: a pool is missing, or the GPUs are not those of so many instances.
        """
        num_mixed = self.mixed.instances if self.mixed else 0
        unsaid = PoolSection(instances=0 if num_mixed else 1)
        pools = {
            Role.PREFILL: self.prefill or unsaid,
            Role.DECODE: self.decode or unsaid,
            Role.MIXED: self.mixed or PoolSection(instances=0),
        }
        if not any(pool.instances for pool in pools.values()):
            raise ConfigError("no instances: give at least --prefill 1 --decode 1, or --mixed 1")
        if not num_mixed:
            for role, other in ((Role.PREFILL, Role.DECODE), (Role.DECODE, Role.PREFILL)):
                if not pools[role].instances:
                    raise ConfigError(
                        f"no {role} instance: a request needs one of each pool; give --{role} 1 or more beside "
                        f"--{other} {pools[other].instances}"
                    )
        elif pools[Role.DECODE].instances and not pools[Role.PREFILL].instances:
            raise ConfigError(
                "no request would come to the decode instances: mixed ones keep the prompts they compute; give "
                "--prefill 1 or more, whose prompts are decoded there, or drop --decode"
            )
        planned = {role: pool.gpus is not None for role, pool in pools.items() if pool.instances}
        if len(set(planned.values())) > 1:
            missing = ", ".join(f"placement.{role}.gpus" for role, has_gpus in planned.items() if not has_gpus)
            raise ConfigError(f"{missing} is missing: either all pools say on which GPUs their instances are, or none")
        return tuple(wanted for role, pool in pools.items() for wanted in _wanted(role, pool))


class ClusterSection(BaseModel):
    """``cluster``, as far as starting a placement depends on it; the last keys are the planner's, which checks them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gpu: str
    nodes: Annotated[int, Field(ge=1)]
    gpus_per_node: Annotated[int, Field(ge=1)]
    intra_node_bandwidth: Bandwidth | None = None
    inter_node_bandwidth: Bandwidth | None = None
    nics_per_node: Degree = 1
    gpu_memory: Any = None
    latency: Any = None
    profile: Any = None

    def spec(self) -> ClusterSpec:
        """The cluster; bandwidths that are not given are zero, as starting does not depend on them."""
        return ClusterSpec(
            self.gpu,
            self.nodes,
            self.gpus_per_node,
            self.intra_node_bandwidth or 0.0,
            self.inter_node_bandwidth or 0.0,
            self.nics_per_node,
        )


class _PlanEngine(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    dtype: Literal["float32", "bfloat16"] | None = None


class _PlanFile(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    model: str | None = None
    placement: PlacementSection
    cluster: ClusterSection
    engine: _PlanEngine = _PlanEngine()


@dataclass(frozen=True, slots=True)
class PlannedSeats:
    """What a plan says of starting it: instances, the cluster they are for; model and data type, if it says so."""

    instances: tuple[WantedInstance, ...]
    cluster: ClusterSpec | None
    model: str | None = None
    dtype: str | None = None


def read_plan(path: Path) -> PlannedSeats:
    """Read a plan file.

    Raises:
        ConfigError: there is none, or it is no plan; says where it is wrong.
    """
    try:
        data: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read the plan {path}: {error}; `distserve plan CONFIG --output` writes one"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"the plan {path} is not valid YAML: {error}") from error
    if not isinstance(data, dict) or not isinstance(data.get("placement"), dict):
        raise ConfigError(f"{path} is no plan: it has no section placement with pools of instances")
    try:
        plan = _PlanFile.model_validate(data)
        instances, cluster = plan.placement.instances(), plan.cluster.spec()
        if any(instance.gpus for instance in instances):
            check_seats(instances, cluster)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors())
        raise ConfigError(f"the plan {path} is damaged: {'; '.join(problems)}") from error
    except ConfigError as error:
        raise ConfigError(f"the plan {path} is damaged: {error}") from error
    return PlannedSeats(instances, cluster, plan.model, plan.engine.dtype)


def _wanted(role: Role, pool: PoolSection) -> list[WantedInstance]:
    parallel = ParallelConfig(pool.tp, pool.pp)
    limits = PlannedLimits(pool.max_batch_tokens, pool.max_batch_size, pool.kv_tokens)
    if pool.gpus is None:
        return [WantedInstance(role, parallel, (), limits)] * pool.instances
    if len(pool.gpus) != pool.instances:
        raise ConfigError(
            f"placement.{role}.gpus lists the GPUs of {len(pool.gpus)} instances, there are {pool.instances}"
        )
    return [WantedInstance(role, parallel, tuple(Gpu(*seat) for seat in seats), limits) for seats in pool.gpus]
