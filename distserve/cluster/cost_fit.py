"""What a cluster's costs are, from loads that were put on one: see :class:`distserve.core.profile.ClusterCosts`."""

from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from distserve.bench.records import RequestRecord
from distserve.core.errors import ConfigError
from distserve.core.latency import StepShape
from distserve.core.profile import ClusterCosts, MeasuredStepTime, StepFit

Floats = NDArray[np.float64]

PROMPTS_ALONE = 2
"""Output tokens of requests that are about their prompts: the second one makes them move to the decode instance."""
_SAME_STEP = 2e-3
"""Seconds within which tokens come from the same step."""
_OUTLIER = 3.0
"""Times the median from which on a gap between two tokens is the machine's doing."""


@dataclass(frozen=True, slots=True)
class Load:
    """``num_clients`` that each wait for their answer send ``num_requests`` in all; lengths in tokens."""

    num_clients: int
    num_requests: int
    prompt_len: int
    output_len: int

    @property
    def is_prompts_alone(self) -> bool:
        """It is about prompts: one at a time, hardly decoded."""
        return self.output_len == PROMPTS_ALONE

    @property
    def is_steady(self) -> bool:
        """Every sequence decodes all the while, after their prompts; each client's requests follow each other."""
        return not self.is_prompts_alone and not self.is_service

    @property
    def is_service(self) -> bool:
        """Prompts are computed while others decode, and come and go, as in service."""
        return self.num_clients > 1 and self.num_requests > self.num_clients


@dataclass(frozen=True, slots=True)
class Cpu:
    """Processor seconds: ``light`` outside the instances; by instance's process, (its engine's, its other threads')."""

    light: float
    instances: dict[int, tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Sample:
    """One load as it went, and the processor seconds it took; ``idle_cores`` are busy without any."""

    load: Load
    records: list[RequestRecord]
    cpu: Cpu
    seconds: float
    idle_cores: float
    offset: float
    """The client's clock plus this is the cluster's."""

    @property
    def timelines(self) -> list[dict[str, Any]]:
        """What the server said of each request."""
        return [record.timeline for record in self.records if record.timeline is not None]


@dataclass(frozen=True, slots=True)
class Samples:
    """What came of :class:`distserve.cluster.costs.Loads`, in their order."""

    usual: list[Sample]
    rested: list[Sample]


def work_out(found: Samples, step_time: MeasuredStepTime, *, pull: float, pull_per_byte: float) -> ClusterCosts:
    """The costs that ``found`` shows.

    ``step_time`` is the engine's own: what is beyond it is the cluster's. Seconds of pulls are measured apart.
    """
    samples = found.usual
    short, long = samples[0], samples[1]
    requests = [
        median(t["arrival"] - (r.scheduled + s.offset) for r, t in zip(s.records, s.timelines, strict=True))
        for s in (short, long)
    ]
    per_token = (requests[1] - requests[0]) / max(1, long.load.prompt_len - short.load.prompt_len)
    per_token = max(0.0, per_token)
    token = median(
        r.event_times[i] + s.offset - at
        for s in samples
        for r, t in zip(s.records, s.timelines, strict=True)
        for i, at in enumerate(t["tokens"][: len(r.event_times)])
    )
    # Owner to router to instance, nothing else being under way; and back.
    message = median((t["prefill_start"] - t["arrival"]) / 2 for t in short.timelines)
    step, per_sequence = _step_costs(samples, step_time)
    # Prompts alone are left out: beside an engine that decodes, what a request costs is twice what it is without.
    busy = [sample for sample in samples if not sample.load.is_prompts_alone]
    light, beside_decode = _split_cpu(busy, _decode_instance(busy))
    counts = np.array([_counts(sample) for sample in busy], dtype=float)
    cpu_per_request, cpu_per_prompt_token, cpu_per_step, cpu_per_token = _shares(counts, light)
    # What a step takes beside the engine is in the step's own cost: left out here, but not laid on the pulls either.
    cpu_per_pull, cpu_per_pulled_token, _ = _shares(counts[:, :3], beside_decode)
    if all(len(sample.cpu.instances) == 1 for sample in busy):
        # One mixed instance pulls nothing: what it does for a request is the request's.
        cpu_per_request += cpu_per_pull
        cpu_per_prompt_token += cpu_per_pulled_token
        cpu_per_pull = cpu_per_pulled_token = 0.0
    return ClusterCosts(
        step=step,
        step_per_sequence=per_sequence,
        message=max(0.0, message),
        request=max(0.0, requests[0] - per_token * short.load.prompt_len),
        request_per_token=per_token,
        token=max(0.0, token),
        pull=pull,
        pull_per_byte=pull_per_byte,
        cpu_per_request=cpu_per_request,
        cpu_per_prompt_token=cpu_per_prompt_token,
        cpu_per_step=cpu_per_step,
        cpu_per_token=cpu_per_token,
        cpu_per_pull=cpu_per_pull,
        cpu_per_pulled_token=cpu_per_pulled_token,
        idle_cores=samples[0].idle_cores,
        waking=_waking(found.rested, step_time.fit.raised(step, per_sequence), message),
    )


def _decode_instance(samples: list[Sample]) -> int:
    """The process of the instance that decodes: whose engine did most where there was much to decode."""
    engines: dict[int, float] = {}
    for sample in samples:
        for process_id, (engine, _) in sample.cpu.instances.items():
            engines[process_id] = engines.get(process_id, 0.0) + engine
    return max(engines, key=engines.__getitem__)


def _split_cpu(samples: list[Sample], decode_id: int) -> tuple[list[float], list[float]]:
    """Of each sample: processor seconds of light work that may be on any core, and of that beside the decode engine."""
    light, beside_decode = [], []
    for sample in samples:
        beside = {process_id: seconds for process_id, (_, seconds) in sample.cpu.instances.items()}
        beside_decode.append(beside.pop(decode_id, 0.0))
        light.append(max(0.0, sample.cpu.light + sum(beside.values()) - sample.idle_cores * sample.seconds))
    return light, beside_decode


def _shares(counts: Floats, seconds: list[float]) -> list[float]:
    """What one of each count takes, such that together they come nearest to ``seconds``; none below zero."""
    # Relative errors: a load that takes long is no better a witness than a short one.
    weights = 1 / np.maximum(np.array(seconds), 1e-3)
    scale = counts.max(axis=0)
    solution, _ = nnls(counts / scale * weights[:, None], np.array(seconds) * weights)
    shares: list[float] = (solution / scale).tolist()
    return shares


def _counts(sample: Sample) -> tuple[int, int, int, int]:
    """(requests, prompt tokens, steps, tokens) of a load; the tokens of a step reach the owner together."""
    num, load = sample.load.num_requests, sample.load
    times = np.sort(np.concatenate([t["tokens"] for t in sample.timelines]))
    return num, num * load.prompt_len, 1 + int((np.diff(times) > _SAME_STEP).sum()), num * load.output_len


def _step_costs(samples: list[Sample], step_time: MeasuredStepTime) -> tuple[float, float]:
    """(per step, per sequence of it) seconds beyond the engine's own, from decode batches; relative least squares."""
    rows, extras = [], []
    for sample in samples:
        gap = _steady_gap(sample) if sample.load.is_steady else None
        if gap is not None:
            seconds, context = gap
            batch = sample.load.num_clients
            shape = StepShape(num_decodes=batch, decode_context=round(batch * context))
            rows.append([1.0 / seconds, batch / seconds])
            # No cluster makes a step shorter: where it seems so, the engine alone was measured too slow.
            extras.append(max(0.0, 1.0 - step_time.seconds(shape) / seconds))
    if not rows:
        raise ConfigError("the model's context is too short to tell what a cluster adds to a step")
    solution, _ = nnls(np.array(rows), np.array(extras))
    return float(solution[0]), float(solution[1])


def _waking(samples: list[Sample], fit: StepFit, message: float) -> float:
    """Seconds to the first token of prompts that come after a pause, beyond two messages and ``fit``."""
    extras: list[float] = []
    for sample in samples:
        num = sample.load.prompt_len
        usual = 2 * message + MeasuredStepTime(fit).seconds(StepShape(num, num * (num + 1) // 2, num_prefills=1))
        extras += [t["first_token"] - t["arrival"] - usual for t in sample.timelines]
    return max(0.0, median(extras))


def _steady_gap(sample: Sample) -> tuple[float, float] | None:
    """Mean seconds per step while every sequence decoded and no prompt was computed, and the mean context then.

    The mean, as a request's TPOT is one; but for steps of which the machine, not the cluster, made something else.
    """
    together = [sample.timelines] if sample.load.num_clients > 1 else [[t] for t in sample.timelines]
    gaps, contexts = [], []
    for group in together:
        begin = max(t["tokens"][0] for t in group)
        end = min(t["tokens"][-1] for t in group)
        for t in group:
            inside = [i for i, at in enumerate(t["tokens"]) if begin <= at <= end]
            steps = [t["tokens"][i] - t["tokens"][i - 1] for i in inside[2:]]
            if steps:
                gaps += steps
                contexts += [sample.load.prompt_len + i for i in inside[2:]]
    if not gaps:
        return None
    usual = [gap for gap in gaps if gap < _OUTLIER * median(gaps)]
    return sum(usual) / len(usual), sum(contexts) / len(contexts)
