"""What the user asked for: one YAML file merged with command-line flags, checked here and nowhere else.

pydantic reads the file (unknown keys refused); inside, everything is a frozen dataclass. An error names the file, the
line, the key's path and what would be valid.
"""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from distserve.cluster.parts import CUDA
from distserve.cluster.placement_section import ClusterSection, PlacementSection, PlannedSeats, read_plan
from distserve.cluster.planner import Planner, find_planner
from distserve.cluster.profile_file import read_profile
from distserve.cluster.seats import WantedInstance, are_on_gpus, check_kv_transport, check_seats, wanted
from distserve.cluster.sizing import KvRequest
from distserve.cluster.yaml_file import beside, explain, read_yaml
from distserve.core.budget import check_budget, saturating_budget
from distserve.core.config import SLO, InstanceSpec, KvConfig, PrefillPolicy, Role, SchedulerConfig
from distserve.core.errors import ConfigError
from distserve.core.router import DEFAULT_SLO
from distserve.core.topology import ClusterSpec

_DEFAULT_MODEL_NAME = "distserve-demo"

_PROMPT_LEN = 512
"""Tokens of the prompts that steps are taken to be full of when a token budget is chosen."""

_IN_PLACE_OF = {"engine.kv_tokens": "kv_memory", "engine.kv_memory": "kv_tokens"}
"""By flag, the file's key that says the same in another way, which the flag overrides too."""

_PLANNED_BY_FILE = ("model", "engine.dtype")
"""What the planner reads in the file: a flag that says otherwise would start something else than was planned."""

_LIMITS_BY_FLAG = {
    "max_batch_tokens": ("engine.max_batch_tokens",),
    "max_batch_size": ("engine.max_batch_size",),
    "kv_tokens": ("engine.kv_tokens", "engine.kv_memory"),
}
"""The flags, for all instances, that win over each of a pool's limits."""

Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class SloSection(_Section):
    """``slo``: the objective the planner plans for and reports are held against."""

    ttft: Seconds
    tpot: Seconds
    attainment: Annotated[float, Field(gt=0, le=1)] = 0.9


class EngineSection(_Section):
    """``engine``: limits and resources of every instance."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    gpu: Annotated[int, Field(ge=0)] | None = None
    max_model_len: Positive | None = None
    kv_tokens: Positive | None = None
    kv_memory: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    block_size: Annotated[int, Field(ge=1, le=256)] = 16
    max_batch_tokens: Positive = 512
    max_batch_size: Positive = 64
    mixed_policy: PrefillPolicy = PrefillPolicy.SPLITFUSE
    profile: Path | None = None
    prefix_caching: bool = False
    prefix_cache_tokens: Positive | None = None
    kv_transport: Literal["auto", "shm", "tcp", "nccl"] = "auto"
    kv_interface: Annotated[str, Field(min_length=1)] | None = None
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None

    def kv(self) -> KvRequest:
        """What is said of KV memory; raises ConfigError if it is said twice."""
        if self.kv_tokens is not None and self.kv_memory is not None:
            raise ConfigError("kv_tokens and kv_memory both say how much KV memory an instance has: drop one")
        num_bytes = None if self.kv_memory is None else int(self.kv_memory)
        return KvRequest(self.kv_tokens, num_bytes, self.block_size)

    def check_prefix_cache(self) -> None:
        """Raise ConfigError if a bound of the prefix cache bounds nothing."""
        if self.prefix_cache_tokens is not None and not self.prefix_caching:
            raise ConfigError("prefix_cache_tokens bounds the prefix cache, which is off: set prefix_caching as well")
        if (self.prefix_cache_tokens or 0) > (self.kv_tokens or float("inf")):
            raise ConfigError(
                f"a prefix cache of {self.prefix_cache_tokens} tokens is more than the KV memory of {self.kv_tokens}, "
                "of which it is a part"
            )

    def token_budget(self, base: Path) -> int:
        """``max_batch_tokens`` if it is set, else where throughput saturates by ``profile``, else the default.

        A relative ``profile`` may be beside ``base``. Raises ConfigError if it is no profile, or of another dtype.
        """
        if self.profile is None or "max_batch_tokens" in self.model_fields_set:
            return self.max_batch_tokens
        profile = read_profile(beside(self.profile, base))
        if profile.dtype != self.dtype:
            raise ConfigError(f"{self.profile} is a profile in {profile.dtype}, to be served is {self.dtype}")
        return saturating_budget(
            profile.shapes[0].step_time(profile.cluster),
            prompt_len=min(_PROMPT_LEN, profile.limits["max_model_len"] // 2),
            least=max(self.max_batch_size, self.block_size),
            most=profile.limits["max_batch_tokens"],
        )


class ServingSection(_Section):
    """``serving``: the endpoint and the process around it."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    api_key: Annotated[str, Field(pattern=r"^[!-~]+$")] | None = None
    served_model_name: str | None = None
    ray_address: str | None = None
    drain_timeout: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 30.0
    event_log: Path | None = None
    node_patience: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


_Placement = Annotated[
    Annotated[str, Tag("text")] | Annotated[PlacementSection, Tag("pools")],
    Discriminator(lambda value: "text" if isinstance(value, str) else "pools"),
]
"""``auto``, the path of a plan, or pools."""


class ConfigFile(_Section):
    """The whole file, which a plan is as well.

    ``workload``, ``cluster`` and ``search`` are the planner's, which checks them; ``prediction`` is what it said of a
    plan.
    """

    model: str | None = None
    slo: SloSection | None = None
    workload: dict[str, Any] | None = None
    cluster: dict[str, Any] | None = None
    search: dict[str, Any] | None = None
    placement: _Placement | None = None
    engine: EngineSection = EngineSection()
    serving: ServingSection = ServingSection()
    prediction: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Limits and resources of every instance. ``max_model_len`` None: the model's; ``threads`` None: a fair share.

    ``mixed_policy`` counts on mixed instances only. ``kv_transport`` (auto, shm, tcp or nccl) and ``kv_interface`` are
    as in :class:`distserve.cluster.parts.KvAccess`, ``hardware`` as in :class:`distserve.cluster.parts.EnginePlan`.
    """

    dtype: str
    max_model_len: int | None
    kv: KvRequest
    max_batch_tokens: int
    max_batch_size: int
    threads: int | None
    mixed_policy: PrefillPolicy = PrefillPolicy.SPLITFUSE
    prefix_caching: bool = False
    prefix_cache_tokens: int | None = None
    kv_transport: str = "auto"
    kv_interface: str | None = None
    gpu: int | None = None
    """The GPU of this machine that all instances share; None: they have one each, or compute on CPUs."""
    hardware: str = CUDA


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """One checked launch.

    ``cluster`` is what the instances' GPUs are of; None where they were not planned for one. ``node_patience`` is how
    long to wait for nodes that a joined cluster lacks, in seconds. ``slo`` is what prompts are divided for between
    prefill and mixed instances.
    """

    model_dir: Path
    instances: tuple[WantedInstance, ...]
    cluster: ClusterSpec | None
    engine: EngineSettings
    host: str
    port: int
    api_key: str | None
    served_model_names: tuple[str, ...]
    ray_address: str | None
    drain_timeout: float
    event_log: Path | None
    node_patience: float = 0.0
    slo: SLO = DEFAULT_SLO

    @property
    def num_instances(self) -> int:
        """Instances of all roles."""
        return len(self.instances)

    @property
    def pools(self) -> tuple[tuple[Role, int], ...]:
        """The roles there are, each with its number of instances."""
        return tuple(Counter(instance.role for instance in self.instances).items())


def load_config(
    path: Path | None, flags: dict[str, Any], default_model: Path, planner: Planner | None = None
) -> ServeConfig:
    """Read ``path`` (None: an empty file), let ``flags`` override it, and check the result.

    Args:
        path: YAML file.
        flags: Values by the file's key paths (``("engine", "dtype")``-like, joined by dots); None is not given.
        default_model: Model directory to serve when neither names one.
        planner: Answers ``placement: auto``; the installed one if None.

    Raises:
        ConfigError: the file cannot be read, or something in it or in the flags is wrong.
    """
    data, lines = read_yaml(path) if path is not None else ({}, {})
    in_file = {name: _said(data, name) for name in _PLANNED_BY_FILE}
    for name, value in flags.items():
        if value is not None:
            section = _override(data, name, value)
            # Said twice on the command line, it is a mistake.
            if name in _IN_PLACE_OF and flags.get(f"engine.{_IN_PLACE_OF[name]}") is None:
                section.pop(_IN_PLACE_OF[name], None)
    try:
        checked = ConfigFile.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error, path, lines, flags, ConfigFile)) from error
    for key in sorted(checked.cluster or ()):
        if key not in ClusterSection.model_fields:
            line = f", line {lines['cluster', key]}" if ("cluster", key) in lines else ""
            known = ", ".join(sorted(ClusterSection.model_fields))
            raise ConfigError(f"{path}{line}: cluster.{key} is unknown; known here: {known}")
    serving, engine = checked.serving, checked.engine
    model_dir = Path(checked.model) if checked.model is not None else default_model
    if path is not None and flags.get("model") is None:
        model_dir = beside(model_dir, path.parent)
    if not model_dir.is_dir():
        raise ConfigError(f"model directory {model_dir} does not exist")
    if serving.node_patience and serving.ray_address is None:
        raise ConfigError(
            "serving.node_patience (--wait-for-nodes) is for the nodes of a cluster that is joined: give "
            "serving.ray_address (--ray-address), or drop it"
        )
    engine.check_prefix_cache()
    if checked.placement == "auto" and planner is None:
        for name, said in in_file.items():
            if flags.get(name) not in (None, said):
                raise ConfigError(
                    f"placement: auto is planned from {path}: say {name}: {flags[name]} there, by no flag"
                )
    planned = _planned(checked, path, model_dir.resolve(), planner)
    planned = replace(planned, instances=_limited(planned.instances, flags))
    if isinstance(checked.placement, str) and "dtype" not in engine.model_fields_set:
        if planned.dtype is not None:
            engine = engine.model_copy(update={"dtype": planned.dtype})
        elif are_on_gpus(planned.cluster):
            raise ConfigError(
                f"the memory of the placement ({checked.placement}) was planned in a data type that nobody says here: "
                "give engine.dtype"
            )
    if engine.gpu is not None:
        _check_gpu(planned, engine, serving)
    check_kv_transport(planned.instances, planned.cluster, engine.kv_transport)
    is_apart = any(len({gpu.node for gpu in instance.gpus}) > 1 for instance in planned.instances)
    if engine.kv_transport == "shm" and engine.kv_interface is not None and not is_apart:
        raise ConfigError("engine.kv_interface is what TCP listens on, and engine.kv_transport shm uses none: drop one")
    is_plan = checked.placement == "auto" or checked.prediction is not None
    has_mixed = any(instance.role is Role.MIXED for instance in planned.instances)
    if "mixed_policy" in engine.model_fields_set and not (has_mixed or is_plan):
        raise ConfigError("mixed_policy is for mixed instances, and there are none: give --mixed 1 or more, or drop it")
    settings = EngineSettings(
        dtype=engine.dtype,
        max_model_len=engine.max_model_len,
        kv=engine.kv(),
        max_batch_tokens=engine.token_budget(path.parent if path is not None else Path()),
        max_batch_size=engine.max_batch_size,
        threads=engine.threads,
        mixed_policy=engine.mixed_policy,
        prefix_caching=engine.prefix_caching,
        prefix_cache_tokens=engine.prefix_cache_tokens,
        kv_transport=engine.kv_transport,
        kv_interface=engine.kv_interface,
        gpu=engine.gpu,
    )
    _check_budgets(planned.instances, settings)
    return ServeConfig(
        model_dir=model_dir.resolve(),
        instances=planned.instances,
        cluster=planned.cluster,
        engine=settings,
        host=serving.host,
        port=serving.port,
        api_key=serving.api_key,
        served_model_names=_names(checked),
        ray_address=serving.ray_address,
        drain_timeout=serving.drain_timeout,
        event_log=serving.event_log.resolve() if serving.event_log else None,
        node_patience=serving.node_patience,
        slo=DEFAULT_SLO if checked.slo is None else SLO(checked.slo.ttft, checked.slo.tpot, checked.slo.attainment),
    )


def _check_gpu(planned: PlannedSeats, engine: EngineSection, serving: ServingSection) -> None:
    """Raise ConfigError for what does not go with all instances on one GPU of this machine."""
    if serving.ray_address is not None:
        raise ConfigError("engine.gpu (--gpu) is a GPU of this machine, and serving.ray_address joins others: drop one")
    if planned.cluster is not None:
        raise ConfigError("engine.gpu (--gpu) puts all instances on one GPU, and the placement says where they are")
    if engine.kv_transport != "auto":
        what = "KV between GPUs" if engine.kv_transport == "nccl" else "KV in host memory"
        raise ConfigError(
            f"engine.kv_transport {engine.kv_transport} is for {what}, and with engine.gpu (--gpu) it is in one GPU's: "
            "leave it out"
        )
    if engine.kv_interface is not None:
        raise ConfigError(
            "engine.kv_interface is for KV between hosts, and with engine.gpu (--gpu) it stays on one GPU"
        )
    if any(instance.limits.kv_tokens for instance in planned.instances):
        raise ConfigError(
            "kv_tokens of a pool does not go with engine.gpu (--gpu), which divides the card: drop it, or give "
            "engine.kv_tokens"
        )
    if sharded := next((i for i in planned.instances if i.parallel.num_ranks > 1), None):
        raise ConfigError(
            f"engine.gpu (--gpu) is one GPU, and a {sharded.role} instance of {sharded.parallel.num_ranks} ranks wants "
            "one for each: set tp and pp to 1"
        )


def _check_budgets(instances: tuple[WantedInstance, ...], engine: EngineSettings) -> None:
    """Raise ConfigError if a step of some instance is too small for what must go into one."""
    for instance in instances:
        limits = instance.limits
        scheduler = SchedulerConfig(
            max_batch_tokens=limits.max_batch_tokens or engine.max_batch_tokens,
            max_batch_size=limits.max_batch_size or engine.max_batch_size,
            policy=engine.mixed_policy,
        )
        kv = KvConfig(0, engine.kv.block_size)
        check_budget(InstanceSpec(f"{instance.role} instance", instance.role, kv, scheduler))


def _names(checked: ConfigFile) -> tuple[str, ...]:
    """Names in the API; none given leaves the choice to whoever reads the model's directory."""
    said = (name.strip() for name in (checked.serving.served_model_name or "").split(","))
    names = tuple(dict.fromkeys(name for name in said if name))
    return names or (() if checked.model is not None else (_DEFAULT_MODEL_NAME,))


def _planned(checked: ConfigFile, path: Path | None, model_dir: Path, planner: Planner | None) -> PlannedSeats:
    """The instances to start: as the file has them, as the plan it names has them, or as the planner says."""
    placement = checked.placement
    if placement == "auto":
        planner = planner or find_planner()
        if planner is None:
            raise ConfigError(
                "placement: auto needs the planner, which is not installed; give counts, for example "
                "placement: {prefill: {instances: 1}, decode: {instances: 1}}"
            )
        assert path is not None, "no flag says auto"
        found = planner(path, model_dir)
        return PlannedSeats(wanted(found), found.cluster)
    if isinstance(placement, str):
        plan = read_plan((path.parent if path is not None else Path()) / placement)
        if plan.model is not None and Path(plan.model).name != model_dir.name:
            raise ConfigError(f"the plan {placement} is for the model {plan.model}, to be served is {model_dir}")
        return plan
    instances = (placement or PlacementSection()).instances()
    if not instances[0].gpus:
        return PlannedSeats(instances, None)
    if checked.cluster is None:
        raise ConfigError(
            "placement says which GPUs the instances are on, but there is no section cluster to have them"
        )
    try:
        cluster = ClusterSection.model_validate(checked.cluster).spec()
    except ValidationError as error:
        problems = (f"cluster.{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors())
        raise ConfigError("; ".join(problems)) from error
    check_seats(instances, cluster)
    return PlannedSeats(instances, cluster)


def _limited(instances: tuple[WantedInstance, ...], flags: dict[str, Any]) -> tuple[WantedInstance, ...]:
    """``instances`` without the limits that ``flags`` give to all of them."""
    said = [limit for limit, names in _LIMITS_BY_FLAG.items() if any(flags.get(name) is not None for name in names)]
    return tuple(replace(one, limits=replace(one.limits, **dict.fromkeys(said))) for one in instances)


def _said(data: dict[str, Any], name: str) -> Any:
    found: Any = data
    for key in name.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _override(data: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """Set the key of the path ``name``; returns the section it is in."""
    *sections, key = name.split(".")
    for section in sections:
        inner = data.get(section)
        if not isinstance(inner, dict):
            # A flag wins over `placement: auto` and the like, but not over a section that is no section at all.
            inner = data[section] = {}
        data = inner
    data[key] = value
    return data
