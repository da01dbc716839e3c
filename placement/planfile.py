"""Writes a plan as the YAML file that ``distserve simulate``, ``serve`` and ``launch`` take.

A plan file is a configuration whose ``placement`` names every instance's GPUs and the limits it was simulated with,
beside the model, objective, workload and cluster it was planned for and what was predicted. Whatever else the
configuration says (engine, serving) is kept; a data type that it does not say is said.
"""

from pathlib import Path
from typing import Any

import yaml

import distserve
from distserve.bench.files import write_atomically
from distserve.cluster.yaml_file import read_yaml
from distserve.core.config import Role
from distserve.core.topology import Placement
from placement.plan import Interval, Percentiles, Plan
from simulator.latency.shape import ModelShape

_PATHS = (("model",), ("workload", "trace"), ("cluster", "profile"), ("engine", "profile"))


class _Flow(list[Any]):
    """A list written on one line."""


class _Dumper(yaml.SafeDumper):
    """Sections as blocks, GPUs of an instance on one line."""


_Dumper.add_representer(
    _Flow, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)
)


def write_plan(path: Path, plan: Plan, config: Path) -> None:
    """Write ``plan``, made for the configuration file ``config``, to ``path``: whole or not at all."""
    text = plan_text(plan, config, path.parent)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def plan_text(plan: Plan, config: Path, directory: Path) -> str:
    """The file's content; paths in it that are relative to the configuration become absolute.

    ``directory`` is where the plan will be: a file named relative to it stays as it is.
    """
    data, _ = read_yaml(config)
    for keys in _PATHS:
        _relocate(data, keys, config.parent, directory)
    if plan.problem.rate is not None:
        workload = dict(data["workload"])
        workload["arrivals"] = {**(workload.get("arrivals") or {}), "rate": plan.problem.rate}
        data["workload"] = workload
    data["engine"] = {"dtype": dtype_name(plan.problem.model)} | (data.get("engine") or {})
    data["placement"] = placement_section(plan.chosen.placement)
    data["prediction"] = _prediction(plan)
    order = ("model", "slo", "workload", "cluster", "search", "placement", "engine", "serving", "prediction")
    head = (
        f"# Written by `distserve plan` {distserve.__version__} for {config.name}: {plan.chosen.label}.\n"
        "# Start it with `distserve launch`, replay a workload through it with `distserve simulate`.\n"
    )
    return head + yaml.dump(
        {key: data[key] for key in order if key in data}, Dumper=_Dumper, sort_keys=False, allow_unicode=True
    )


def dtype_name(model: ModelShape) -> str:
    """The data type of the section ``engine`` that makes a launch take the memory that was planned with."""
    return "float32" if model.dtype_bytes == 4 else "bfloat16"


def placement_section(placement: Placement) -> dict[str, Any]:
    """The pools of ``placement``, with GPUs and limits."""
    section: dict[str, Any] = {}
    for role in Role:
        placed = placement.of(role)
        if not placed:
            continue
        spec = placed[0].spec
        section[role.value] = {
            "instances": len(placed),
            "tp": spec.parallel.tp,
            "pp": spec.parallel.pp,
            "gpus": [_Flow(_Flow((gpu.node, gpu.index)) for gpu in instance.gpus) for instance in placed],
            "max_batch_tokens": spec.scheduler.max_batch_tokens,
            "max_batch_size": spec.scheduler.max_batch_size,
            "kv_tokens": spec.kv.num_tokens,
        }
    return section


def _prediction(plan: Plan) -> dict[str, Any]:
    point, chosen = plan.chosen.point, plan.chosen
    return {
        "rate": _rounded(point.rate),
        "attainment": _interval(point.attainment),
        "holds": plan.holds,
        "ttft": _percentiles(point.ttft),
        "tpot": _percentiles(point.tpot),
        "goodput": _interval(chosen.goodput),
        "goodput_per_gpu": _rounded(chosen.goodput_per_gpu),
        "num_gpus": chosen.num_gpus,
        "binding_constraint": chosen.binding,
        "latency_source": plan.problem.latency.source,
        "seed": plan.problem.search.seed,
    }


def _interval(interval: Interval) -> dict[str, float]:
    return {
        "estimate": _rounded(interval.estimate),
        "low": _rounded(interval.low),
        "high": _rounded(interval.high),
    }


def _percentiles(values: Percentiles) -> dict[str, float]:
    return {name: _rounded(getattr(values, name)) for name in ("mean", "p50", "p90", "p99")}


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _relocate(data: dict[str, Any], keys: tuple[str, ...], base: Path, directory: Path) -> None:
    """Make a path absolute that means something only beside the configuration."""
    *sections, key = keys
    for section in sections:
        data = data.get(section) or {}
    given = data.get(key)
    if isinstance(given, str) and not Path(given).exists() and (base / given).exists():
        if (directory / given).exists() and (directory / given).samefile(base / given):
            return
        data[key] = str((base / given).resolve())
