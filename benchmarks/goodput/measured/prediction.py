"""What the simulator says of measured runs of ours: the same arrivals and lengths, timed by this machine's profile."""

from typing import Any

import numpy as np

from benchmarks.common.systems import MAX_BATCH_SIZE, MAX_MODEL_LEN
from benchmarks.fidelity_cpu.predict import cluster_model, variants
from benchmarks.goodput.measured.contenders import KV_TOKENS, Contender
from benchmarks.goodput.measured.runs import WORKLOADS, Requests
from distserve.bench.workload import Workload
from distserve.core.config import SchedulerConfig
from distserve.core.router import RouterConfig
from simulator.latency.measured import ProfileLatencyModel
from simulator.simulation import simulate


def predict(profile: ProfileLatencyModel, contender: Contender, run: dict[str, Any]) -> dict[str, Any]:
    """The figures of ``run``, a measured one, as :meth:`Requests.figures` gives them.

    Each is the median over simulations with arrivals that are some milliseconds off, as in ``fidelity_cpu``. In a
    figure that some of them lack, because nothing was answered, the others count.
    """
    measured = Requests.from_json(run["requests"])
    scheduler = SchedulerConfig(
        max_batch_tokens=run["budget"], max_batch_size=MAX_BATCH_SIZE, max_model_len=MAX_MODEL_LEN
    )
    mean_prompt = WORKLOADS[run["workload"]].mean_prompt
    assert contender.deployment is not None, "only ours are predicted"
    slo = contender.deployment.slo
    router = RouterConfig() if slo is None else RouterConfig(slo=slo)
    model = cluster_model(
        profile, contender.pools, mean_prompt, scheduler=scheduler, kv_tokens=KV_TOKENS, router=router
    )
    workload = Workload(
        measured.prompt_tokens.astype(np.int64), measured.output_tokens.astype(np.int64), measured.arrival
    )
    found = [
        Requests.simulated(simulate(model, shifted).timelines).figures(run["warmup"]) for shifted in variants(workload)
    ]
    attainments = np.median([one["attainments"] for one in found], axis=0).tolist()
    return {
        "attainments": attainments,
        **{name: _median([one[name] for one in found]) for name in found[0] if name != "attainments"},
    }


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None
