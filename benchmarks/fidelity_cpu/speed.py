"""How fast the machine is at the moment: what its steps take of the times in a profile.

A virtual machine's neighbours come and go, and a profile is of the minutes in which it was taken. A *probe* is a closed
loop of a few seconds, of lengths and loads that no measured run has. It is simulated with the arrivals that it had; the
speed is the one at which the simulated latencies of its requests are the measured ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from distserve.bench.workload import Workload
from distserve.core.latency import StepShape, StepTime
from simulator.model import ClusterModel
from simulator.results import Timelines
from simulator.simulation import simulate

PROBE: dict[str, object] = {
    "clients": 4,
    "num_requests": 40,
    "prompt_len": "normal:mean=400,std=100,max=700",
    "output_len": "normal:mean=32,std=6,max=60",
}
"""As ``distserve bench`` takes it: about six seconds in which prompts are computed while other requests decode."""
PROBE_MEAN_PROMPT = 400.0
_LEAST, _MOST = 0.6, 1.7
_ROUNDS = 2
_HALVINGS = 9
"""Of the range of a factor, to within 0.2%."""
_STEADY = 0.06


@dataclass(frozen=True)
class Speed:
    """Seconds of steps over those in the profile: ``prompts`` of steps with prompt tokens, ``decodes`` of others."""

    prompts: float = 1.0
    decodes: float = 1.0

    def between(self, other: "Speed") -> "Speed":
        """The geometric mean of both."""
        return Speed((self.prompts * other.prompts) ** 0.5, (self.decodes * other.decodes) ** 0.5)

    def is_near(self, other: "Speed") -> bool:
        """Whether the machine did not change from one to the other by more than probes differ by themselves."""
        pairs = ((self.prompts, other.prompts), (self.decodes, other.decodes))
        return all(abs(np.log(one / two)) <= _STEADY for one, two in pairs)


PROFILED = Speed()
"""The machine as it was when the profile was taken."""


class StepTimeAt:
    """Implements :class:`distserve.core.latency.StepTime`: ``step_time`` on a machine of another ``speed``."""

    def __init__(self, step_time: StepTime, speed: Speed) -> None:
        self._step_time = step_time
        self._speed = speed

    def _factor(self, shape: StepShape) -> float:
        return self._speed.prompts if shape.num_prefill_tokens else self._speed.decodes

    def seconds(self, shape: StepShape) -> float:
        """See :class:`distserve.core.latency.StepTime`."""
        return self._factor(shape) * self._step_time.seconds(shape)

    def handover(self, shape: StepShape) -> float:
        """See :class:`distserve.core.latency.StepTime`."""
        return self._factor(shape) * self._step_time.handover(shape)


def workload_of(lines: Sequence[dict[str, Any]]) -> Workload:
    """The arrivals and lengths of measured requests, as :func:`benchmarks.fidelity_cpu.timelines.rows` gives them."""
    return Workload(
        np.array([line["prompt_tokens"] for line in lines]),
        np.array([line["output_tokens"] for line in lines]),
        np.array([line["arrival"] for line in lines]),
    )


def speed_of(probe: Sequence[dict[str, Any]], model_at: Callable[[Speed], ClusterModel]) -> Speed:
    """The speed at which the median of the probe's TTFTs, each over the simulated one, is 1; of its TPOTs likewise.

    ``probe`` are its requests in the order of their arrivals. Both ratios fall with the speed they are of and hardly
    change with the other one, so that to find one after the other, twice, finds both. By halving: where a probe keeps
    an engine busy all the time, requests that queue amplify what a step takes longer, and anything bolder overshoots.
    """
    workload = workload_of(probe)
    ttft = np.array([line["first_token"] - line["arrival"] for line in probe])
    tpot = np.array([(line["finish"] - line["first_token"]) / (line["output_tokens"] - 1) for line in probe])

    def simulated(prompts: float, decodes: float) -> Timelines:
        return simulate(model_at(Speed(prompts, decodes)), workload).timelines

    def ttft_off(prompts: float, decodes: float) -> float:
        return float(np.median(ttft / simulated(prompts, decodes).ttft))

    def tpot_off(decodes: float, prompts: float) -> float:
        return float(np.median(tpot / simulated(prompts, decodes).tpot))

    prompts, decodes = PROFILED.prompts, PROFILED.decodes
    for _ in range(_ROUNDS):
        prompts = _find(partial(ttft_off, decodes=decodes))
        decodes = _find(partial(tpot_off, prompts=prompts))
    return Speed(prompts, decodes)


def _find(ratio: Callable[[float], float]) -> float:
    """The factor at which ``ratio``, which falls with it, is 1."""
    low, high = _LEAST, _MOST
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if ratio(middle) > 1 else (low, middle)
    return float((low * high) ** 0.5)
