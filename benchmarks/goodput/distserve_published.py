"""What DistServe published of its end-to-end experiments (figures 8 and 9), as its artifact's scripts have it.

Rates, numbers of requests and the baseline's options are those of LLMServe/DistServe, evaluation/ae-scripts/e2e and
evaluation/2-benchmark-serving; ratios are of the OSDI paper (section 6.2) and of the first version (arXiv
2401.09670v1), for single models of the chatbot those its plotting notebook printed.
"""

from dataclasses import dataclass

from distserve.core.config import SLO

VLLM_BATCH_TOKENS = 16384
"""``--max-num-batched-tokens`` of the baseline."""
MII_BATCH_TOKENS = 768
"""DeepSpeed-MII's default budget."""
SMALL_BATCH_TOKENS = 2560
"""vLLM's own default of the time, which ``placement`` takes too."""


@dataclass(frozen=True)
class Published:
    """One workload; rates in requests/s and GPU.

    ``rates`` were swept with ``requests`` requests for each GPU, SLO scales (factors on both limits) at ``scale_rate``.
    The baseline was one instance of ``tp``. ``first_slo``: limits of the first version where they differ. Ratios:
    DistServe's rate over the baseline's, and the baseline's SLO scale over DistServe's, at 90% attainment; a text where
    only a range over models is known.
    """

    rates: tuple[float, ...]
    requests: int
    scale_rate: float
    tp: int
    rate_over_vllm: float
    rate_over_mii: float | None
    slo_over_vllm: float | str
    slo_over_mii: float | str | None
    first_rate: float | str
    first_scale: float | str
    first_slo: SLO | None = None


def _steps(first: float, last: float, step: float) -> tuple[float, ...]:
    return tuple(first + step * index for index in range(round((last - first) / step) + 1))


PUBLISHED = {
    "opt-13b-sharegpt": Published(
        rates=(0.25, 0.5, 1.0, 1.5, 2.0, 2.25, 2.5, 3.0),
        requests=100,
        scale_rate=1.5,
        tp=1,
        rate_over_vllm=4.6,
        rate_over_mii=7.36,
        slo_over_vllm="1.8-3.2",
        slo_over_mii="1.7-1.8",
        first_rate="2.0-3.41",
        first_scale="1.4-1.8",
        first_slo=SLO(0.2, 0.1),
    ),
    "opt-66b-sharegpt": Published(
        rates=(0.0625, *_steps(0.125, 0.75, 0.125)),
        requests=25,
        scale_rate=0.25,
        tp=4,
        rate_over_vllm=2.75,
        rate_over_mii=1.57,
        slo_over_vllm="1.8-3.2",
        slo_over_mii="1.7-1.8",
        first_rate="2.0-3.41",
        first_scale="1.4-1.8",
        first_slo=SLO(0.4, 0.1),
    ),
    "opt-175b-sharegpt": Published(
        rates=_steps(0.03125, 0.3125, 0.03125),
        requests=25,
        scale_rate=0.125,
        tp=8,
        rate_over_vllm=1.99,
        rate_over_mii=None,
        slo_over_vllm="1.8-3.2",
        slo_over_mii=None,
        first_rate="2.0-3.41",
        first_scale="1.4-1.8",
    ),
    "opt-66b-humaneval": Published(
        rates=_steps(0.125, 2.125, 0.25),
        requests=50,
        scale_rate=0.875,
        tp=4,
        rate_over_vllm=5.7,
        rate_over_mii=1.6,
        slo_over_vllm=1.4,
        slo_over_mii=1.4,
        first_rate=3.2,
        first_scale=1.5,
    ),
    "opt-66b-longbench": Published(
        rates=_steps(0.0625, 0.625, 0.0625),
        requests=25,
        scale_rate=0.375,
        tp=4,
        rate_over_vllm=4.3,
        rate_over_mii=1.8,
        slo_over_vllm=12.6,
        slo_over_mii=2.6,
        first_rate=4.48,
        first_scale=10.2,
    ),
}
