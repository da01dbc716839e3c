"""What the user asked for: one YAML file merged with command-line flags, checked here and nowhere else.

pydantic reads the file (unknown keys refused); inside, everything is a frozen dataclass. An error names the file, the
line, the key's path and what would be valid.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distserve.cluster.sizing import KvRequest
from distserve.core.config import Role
from distserve.core.errors import ConfigError

_DEFAULT_MODEL_NAME = "distserve-demo"

Count = Annotated[int, Field(ge=0, le=10_000)]
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


class PoolSection(_Section):
    """``placement.prefill`` and its like: a pool of equal instances."""

    instances: Count = 1


class PlacementSection(_Section):
    """``placement``: how many instances of each role; without mixed ones, one prefill and one decode if unsaid."""

    prefill: PoolSection | None = None
    decode: PoolSection | None = None
    mixed: PoolSection | None = None


class EngineSection(_Section):
    """``engine``: limits and resources of every instance."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    max_model_len: Positive | None = None
    kv_tokens: Positive | None = None
    kv_memory: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    block_size: Annotated[int, Field(ge=1, le=256)] = 16
    max_batch_tokens: Positive = 512
    max_batch_size: Positive = 64
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None


class ServingSection(_Section):
    """``serving``: the endpoint and the process around it."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    api_key: str | None = None
    served_model_name: str | None = None
    ray_address: str | None = None
    drain_timeout: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 30.0
    event_log: Path | None = None


class ConfigFile(_Section):
    """The whole file. ``workload`` and ``cluster`` are the planner's, which checks them."""

    model: str | None = None
    slo: SloSection | None = None
    workload: dict[str, Any] | None = None
    cluster: dict[str, Any] | None = None
    placement: Literal["auto"] | PlacementSection | None = None
    engine: EngineSection = EngineSection()
    serving: ServingSection = ServingSection()


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Limits and resources of every instance. ``max_model_len`` None: the model's; ``threads`` None: a fair share."""

    dtype: str
    max_model_len: int | None
    kv: KvRequest
    max_batch_tokens: int
    max_batch_size: int
    threads: int | None


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """One checked launch."""

    model_dir: Path
    pools: tuple[tuple[Role, int], ...]
    engine: EngineSettings
    host: str
    port: int
    api_key: str | None
    served_model_names: tuple[str, ...]
    ray_address: str | None
    drain_timeout: float
    event_log: Path | None

    @property
    def num_instances(self) -> int:
        """Instances of all roles."""
        return sum(count for _, count in self.pools)


def load_config(path: Path | None, flags: dict[str, Any], default_model: Path) -> ServeConfig:
    """Read ``path`` (None: an empty file), let ``flags`` override it, and check the result.

    Args:
        path: YAML file.
        flags: Values by the file's key paths (``("engine", "dtype")``-like, joined by dots); None is not given.
        default_model: Model directory to serve when neither names one.

    Raises:
        ConfigError: the file cannot be read, or something in it or in the flags is wrong.
    """
    data, lines = _read(path) if path is not None else ({}, {})
    for name, value in flags.items():
        if value is not None:
            _override(data, name, value)
    try:
        checked = ConfigFile.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(error, path, lines, flags)) from error
    pools = _pools(checked)
    serving, engine = checked.serving, checked.engine
    model_dir = Path(checked.model) if checked.model is not None else default_model
    if not model_dir.is_dir():
        raise ConfigError(f"model directory {model_dir} does not exist")
    return ServeConfig(
        model_dir=model_dir.resolve(),
        pools=pools,
        engine=EngineSettings(
            dtype=engine.dtype,
            max_model_len=engine.max_model_len,
            kv=KvRequest(
                engine.kv_tokens, None if engine.kv_memory is None else int(engine.kv_memory), engine.block_size
            ),
            max_batch_tokens=engine.max_batch_tokens,
            max_batch_size=engine.max_batch_size,
            threads=engine.threads,
        ),
        host=serving.host,
        port=serving.port,
        api_key=serving.api_key,
        served_model_names=_names(checked),
        ray_address=serving.ray_address,
        drain_timeout=serving.drain_timeout,
        event_log=serving.event_log.resolve() if serving.event_log else None,
    )


def _names(checked: ConfigFile) -> tuple[str, ...]:
    """Names in the API; none given leaves the choice to whoever reads the model's directory."""
    names = tuple(name for name in (checked.serving.served_model_name or "").split(",") if name)
    return names or (() if checked.model is not None else (_DEFAULT_MODEL_NAME,))


def _pools(checked: ConfigFile) -> tuple[tuple[Role, int], ...]:
    placement = checked.placement
    if placement == "auto":
        raise ConfigError(
            "placement: auto needs the planner, which is not installed; give counts, for example "
            "placement: {prefill: {instances: 1}, decode: {instances: 1}}"
        )
    given = placement or PlacementSection()
    num_mixed = given.mixed.instances if given.mixed else 0
    unsaid = PoolSection(instances=0 if num_mixed else 1)
    counts = {
        Role.PREFILL: (given.prefill or unsaid).instances,
        Role.DECODE: (given.decode or unsaid).instances,
        Role.MIXED: num_mixed,
    }
    if not any(counts.values()):
        raise ConfigError("no instances: give at least --prefill 1 --decode 1, or --mixed 1")
    if not num_mixed:
        for role, other in ((Role.PREFILL, Role.DECODE), (Role.DECODE, Role.PREFILL)):
            if not counts[role]:
                raise ConfigError(
                    f"no {role} instance: a request needs one of each pool; give --{role} 1 or more beside "
                    f"--{other} {counts[other]}"
                )
    return tuple((role, count) for role, count in counts.items() if count)


def _override(data: dict[str, Any], name: str, value: Any) -> None:
    *sections, key = name.split(".")
    for section in sections:
        inner = data.get(section)
        if not isinstance(inner, dict):
            # A flag wins over `placement: auto` and the like, but not over a section that is no section at all.
            inner = data[section] = {}
        data = inner
    data[key] = value


def _read(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    try:
        data = yaml.safe_load(text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if data is None:
        return {}, {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected keys and values, such as `model: ./my-llama`")
    return data, dict(_lines(root, ()))


def _lines(node: yaml.Node | None, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], int]]:
    if not isinstance(node, yaml.MappingNode):
        return []
    found = []
    for key, value in node.value:
        here = (*path, str(key.value))
        found.append((here, key.start_mark.line + 1))
        found.extend(_lines(value, here))
    return found


def _explain(
    error: ValidationError, path: Path | None, lines: dict[tuple[str, ...], int], flags: dict[str, Any]
) -> str:
    """One sentence per mistake: where it is, what is wrong, what would be valid."""
    sentences = []
    for problem in error.errors():
        # pydantic adds the member of a union to the path; our keys are those a section or the file can have.
        loc = tuple(str(part) for part in problem["loc"] if not str(part).startswith(("literal[", "PlacementSection")))
        name = ".".join(loc)
        if flags.get(name) is not None:
            where = f"--{loc[-1].replace('_', '-')}" if loc[-1] != "instances" else f"--{loc[-2]}"
        elif loc in lines:
            where = f"{path}, line {lines[loc]}: {name}"
        else:
            where = f"{path}: {name}" if path else name
        if problem["type"] == "extra_forbidden":
            known = _keys_at(loc[:-1])
            sentences.append(f"{where} is unknown; known here: {', '.join(known)}")
        elif problem["type"] == "literal_error" and name == "placement":
            sentences.append(f"{where}: must be auto or pools, such as {{prefill: {{instances: 2}}, decode: {{...}}}}")
        else:
            message = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
            sentences.append(f"{where}: {problem['input']!r} is wrong, must be {message}")
    return "\n".join(dict.fromkeys(sentences))


def _keys_at(path: tuple[str, ...]) -> list[str]:
    section: Any = ConfigFile
    for name in path:
        annotation = section.model_fields[name].annotation
        candidates = getattr(annotation, "__args__", (annotation,))
        section = next(part for part in candidates if isinstance(part, type) and issubclass(part, BaseModel))
    return sorted(section.model_fields)
