"""A plan as one JSON document.

``schema`` is "distserve-plan/1"; times in seconds, rates in requests/s, memory in bytes, absent
figures null::

    created          ISO 8601, UTC
    model, slo       name; ttft, tpot, attainment
    rate             requests/s planned for; null: the best goodput per GPU was asked for
    cluster          gpu, num_nodes, gpus_per_node, intra_node_bandwidth, inter_node_bandwidth, nics_per_node
    latency_source   where the times of steps come from
    holds            the whole interval of the chosen placement's attainment is at the target
    chosen, runner_up, disaggregated, colocated, hybrid, paper     an evaluation, or null
    finalists[]      evaluations
      evaluation:    label, num_gpus, num_nodes, policy, goodput (estimate, low, high), goodput_per_gpu, binding,
                     placement[] (instance_id, role, tp, pp, gpus as [node, index] in rank order),
                     point, curve[] (rate, attainment, ttft_attainment, tpot_attainment, ttft and tpot percentiles,
                     num_requests, num_runs, instability), instances[] (plan.InstanceUse), links[] (plan.LinkUse)
    outlook          variants[] (change, label, num_gpus, point, goodput, reason), goodput_tolerance, breaks (what
                     fails first above the goodput), above[] (points there),
                     phases[] (outlook.Phases), flows[] (source, target: positions in placement; rate in bytes/s);
                     curves[] (name, label, points[]; with --plot); or null
    stats, notes     what the search did; what a reader must know
"""

import math
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Any

from placement.outlook import Outlook
from placement.plan import Evaluation, Plan

SCHEMA = "distserve-plan/1"


def to_document(plan: Plan, outlook: Outlook | None) -> dict[str, Any]:
    """The JSON document, as plain dicts and lists."""
    problem = plan.problem
    rivals = {
        name: None if found is None else _evaluation(found)
        for name, found in (
            ("chosen", plan.chosen),
            ("runner_up", plan.runner_up),
            ("disaggregated", plan.disaggregated),
            ("colocated", plan.colocated),
            ("hybrid", plan.hybrid),
            ("paper", plan.paper),
        )
    }
    document = {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": problem.model.name,
        "slo": asdict(problem.slo),
        "rate": problem.rate,
        "cluster": asdict(problem.cluster),
        "latency_source": problem.latency.source,
        "holds": plan.holds,
        **rivals,
        "finalists": [_evaluation(found) for found in plan.finalists],
        "outlook": None
        if outlook is None
        else {
            "variants": [asdict(variant) for variant in outlook.variants],
            "goodput_tolerance": outlook.goodput_tolerance,
            "breaks": outlook.breaks,
            "above": [asdict(point) for point in outlook.above],
            "phases": [asdict(phases) for phases in outlook.phases],
            "flows": [asdict(flow) for flow in outlook.flows],
            "curves": [
                {
                    "name": curve.name,
                    "label": curve.evaluation.label,
                    "points": [asdict(point) for point in curve.points],
                }
                for curve in outlook.curves
            ],
        },
        "stats": asdict(plan.stats),
        "notes": list(plan.notes),
    }
    clean: dict[str, Any] = _clean(document)
    return clean


def _evaluation(found: Evaluation) -> dict[str, Any]:
    parts = ("label", "policy", "goodput", "binding", "point", "curve", "instances", "links")
    fields: dict[str, Any] = {name: _plain(getattr(found, name)) for name in parts}
    fields["placement"] = [
        {
            "instance_id": instance.spec.instance_id,
            "role": instance.spec.role,
            "tp": instance.spec.parallel.tp,
            "pp": instance.spec.parallel.pp,
            "gpus": [[gpu.node, gpu.index] for gpu in instance.gpus],
        }
        for instance in found.placement.instances
    ]
    return fields | {
        "num_gpus": found.num_gpus,
        "num_nodes": found.placement.num_nodes,
        "goodput_per_gpu": found.goodput_per_gpu,
    }


def _plain(value: Any) -> Any:
    """Facts as dicts."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _clean(value: Any) -> Any:
    """``value`` for JSON: NaN and infinity are not JSON, six significant digits are enough."""
    if isinstance(value, dict):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
