"""How fast the machine is at the moment: what its steps take of the times in a profile.

A virtual machine's neighbours come and go, and a profile is of the minutes in which it was taken. A *probe* is a closed
loop of a few seconds, of lengths and loads that no measured run has. It is simulated with the arrivals that it had; the
speed is the one at which the simulated latencies of its requests are the measured ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
_ROUNDS = 12
_DAMPING = 0.7
"""Of a latency's error, as an exponent: requests that queue amplify what a step takes longer."""
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

    ``probe`` are its requests in the order of their arrivals. Both ratios rise with the speed they are of and hardly
    with the other one, so that going towards them by turns ends at both.
    """
    workload = workload_of(probe)
    ttft = np.array([line["first_token"] - line["arrival"] for line in probe])
    tpot = np.array([(line["finish"] - line["first_token"]) / (line["output_tokens"] - 1) for line in probe])
    speed = PROFILED
    for _ in range(_ROUNDS):
        simulated: Timelines = simulate(model_at(speed), workload).timelines
        speed = Speed(
            _towards(speed.prompts, ttft / simulated.ttft),
            _towards(speed.decodes, tpot / simulated.tpot),
        )
    return speed


def _towards(factor: float, ratios: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    return float(np.clip(factor * np.median(ratios) ** _DAMPING, _LEAST, _MOST))
