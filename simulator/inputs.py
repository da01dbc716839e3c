"""What a configuration file says of a model, a workload, a cluster and the times of steps; mistakes with their place.

The file is the one that ``distserve serve`` and ``launch`` take. The planner and the simulator read it here, each with
the sections it cannot do without.
"""

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from distserve.cluster.config import ConfigFile, EngineSection
from distserve.cluster.seats import CPU
from distserve.cluster.sizing import default_kv_bytes
from distserve.cluster.yaml_file import beside, explain, read_yaml
from distserve.core.errors import ConfigError
from distserve.core.topology import ClusterSpec
from simulator.latency.aiconfigurator import AiconfiguratorModel
from simulator.latency.analytic import AnalyticModel
from simulator.latency.distserve_profile import DistServeProfile
from simulator.latency.interface import LatencyModel
from simulator.latency.measured import ProfileLatencyModel
from simulator.latency.shape import ModelShape
from simulator.sections import ClusterSection, WorkloadSection

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_UNKNOWN_LENGTH = 2048
"""Tokens of the longest sequence where a model's configuration does not say."""
_EXAMPLES = {
    "slo": "such as slo: {ttft: 0.4, tpot: 0.04, attainment: 0.9}",
    "workload": "such as workload: {trace: azure2023_conv.csv}, or prompt, output and arrivals",
    "cluster": "such as cluster: {gpu: h100-sxm, nodes: 4, gpus_per_node: 8, intra_node_bandwidth: 450e9, "
    "inter_node_bandwidth: 50e9}",
}


class SimulationFile(ConfigFile):
    """The whole file, with the sections that a simulation cannot do without."""

    workload: WorkloadSection  # type: ignore[assignment]
    cluster: ClusterSection  # type: ignore[assignment]


File = TypeVar("File", bound=ConfigFile)


def read_file(path: Path, kind: type[File], *, sections: tuple[str, ...], purpose: str) -> File:
    """Read and check the file at ``path``, which must have ``sections``, for ``purpose`` (a word for messages).

    Raises ConfigError with the key and line of a mistake and what would be valid.
    """
    data, lines = read_yaml(path)
    for section in sections:
        if not isinstance(data.get(section), dict):
            raise ConfigError(f"{path}: {purpose} needs the section {section}, {_EXAMPLES[section]}")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error, path, lines, {}, kind)) from error


def read_model(name: str | None, engine: EngineSection, base: Path, gpu: str) -> ModelShape:
    """The model's shape: a directory or config.json as given or relative to ``base``; the demo model if unsaid.

    Its data type is the engine's. Where the file names none, that is the engine's default on CPUs, and the model's own
    on a ``gpu``, for which plans name it.
    """
    if name is None:
        from distserve.demo import model_dir

        path = model_dir()
    else:
        path = beside(Path(name), base)
    shape = ModelShape.load(path)
    if "dtype" in engine.model_fields_set or gpu == CPU:
        shape = replace(shape, dtype_bytes=_DTYPE_BYTES[engine.dtype])
    return shape


def most_kv(cluster: ClusterSection, engine: EngineSection, model: ModelShape) -> int | None:
    """Bytes of KV memory that an instance has at most if nobody says how much; None: what its GPU has left.

    On CPUs a launch gives no more, since what else the machine is for is not known.
    """
    if cluster.spec().gpu != CPU or cluster.gpu_memory is not None:
        return None
    lengths = [length for length in (engine.max_model_len, model.max_model_len) if length]
    return default_kv_bytes(model.kv.bytes_per_token, min(lengths, default=_UNKNOWN_LENGTH), engine.block_size)


def read_latency(
    section: ClusterSection,
    model: ModelShape,
    cluster: ClusterSpec,
    base: Path,
    *,
    kind: str | None = None,
    profile: Path | None = None,
    name: str | None = None,
) -> LatencyModel:
    """The source of step times: ``kind`` and ``profile`` (flags) win over the file, and a named profile is meant.

    ``name`` is what the file calls the model: tables that come with their models' configurations know it by that.
    """
    path = profile
    if path is None and section.profile is not None:
        path = beside(section.profile, base)
    chosen = kind or section.latency or ("profile" if path is not None else "analytic")
    if chosen == "analytic":
        return AnalyticModel(model, cluster)
    if chosen == "aiconfigurator":
        return AiconfiguratorModel(beside(Path(name), base) if name is not None else model.name, model, cluster)
    if path is None:
        hint = (
            "`distserve profile MODEL --output FILE` makes one" if chosen == "profile" else "DistServe's JSON of fits"
        )
        raise ConfigError(f"step times by {chosen} need --profile FILE: {hint}")
    if chosen == "profile":
        return _in_dtype(ProfileLatencyModel.read(path), model)
    if cluster.gpu != "a100-80g-sxm":
        raise ConfigError(f"DistServe's fits are of a100-80g-sxm, the cluster has {cluster.gpu}")
    return DistServeProfile.load(path, model.name)


def _in_dtype(latency: ProfileLatencyModel, model: ModelShape) -> ProfileLatencyModel:
    """``latency``, unless its steps were measured in another data type than ``model`` is to have."""
    dtype = latency.profile.dtype
    if _DTYPE_BYTES[dtype] != model.dtype_bytes:
        raise ConfigError(
            f"the profile of {latency.profile.model} is in {dtype}, with {_DTYPE_BYTES[dtype]} bytes a value, the "
            f"instances would have {model.dtype_bytes}: give engine: {{dtype: {dtype}}}, or take a profile with --dtype"
        )
    return latency
