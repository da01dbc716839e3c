"""Least squares on the logarithm of times, robust against single rows, held near a prior where data say little."""

from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, replace

import numpy as np
from scipy.optimize import least_squares

from benchmarks.latency_models.operators import Table
from benchmarks.latency_models.steps import Group
from simulator.latency.efficiency import Efficiency, Engine
from simulator.latency.kernels import Array

# Which coefficients each kind of kernel is described by: those whose names begin so.
KINDS = {
    "gemm": "gemm_",
    "expert": "expert_",
    "prefill": "attention_",
    "decode": "decode_",
    "mixed": "mixed_",
    "stream": "stream_",
    "all_reduce": "all_reduce_",
    "send": "send_",
}
_ROWS = 1000
# No more of a peak than there is (a boosted clock may add a tenth), and no tile better than the largest.
_MOST = {"gemm_compute": 1.1, "gemm_medium": 1.0, "gemm_narrow": 1.0, "gemm_small": 1.0, "gemm_memory": 1.0}
_MOST |= {"expert_compute": 1.1, "expert_memory": 1.15}
_MOST |= {"attention_compute": 1.1, "attention_memory": 1.0, "decode_memory": 1.0}
_MOST |= {"all_reduce_bandwidth": 1.0, "send_bandwidth": 1.0}
_SOFT = 0.1
_PRIOR = 1.0


def fit(
    residuals: Callable[[Array], Array], start: Sequence[float], low: Sequence[float], high: Sequence[float]
) -> list[float]:
    """Positive parameters that make ``residuals`` of their logarithms small, within bounds, near ``start``."""
    at = np.log(np.array(start))

    def weighted(x: Array) -> Array:
        errors = residuals(x)
        return np.concatenate([errors, _PRIOR * 0.1 * (x - at)])

    bounds = (np.log(np.array(low)), np.log(np.array(high)))
    found = least_squares(weighted, at, loss="soft_l1", f_scale=_SOFT, bounds=bounds, diff_step=1e-3, x_scale=0.3)
    return [float(value) for value in np.exp(found.x)]


def coefficients(prefix: str) -> list[str]:
    """The coefficients of one kind of kernel that tables of kernels decide; those with a default are an engine's."""
    return [field.name for field in fields(Efficiency) if field.name.startswith(prefix) and field.default is MISSING]


def fit_kernels(tables: list[Table], start: Efficiency) -> Efficiency:
    """``start`` with the coefficients of every kind of kernel in ``tables`` fitted, each table weighing the same."""
    fitted = start
    for kind, prefix in KINDS.items():
        chosen = [table.sample(_ROWS) for table in tables if table.kind == kind]
        names = coefficients(prefix)
        if not chosen:
            continue
        most = [_MOST.get(name, getattr(fitted, name) * 30) for name in names]
        begin = [getattr(fitted, name) for name in names]

        def residuals(
            x: Array, names: list[str] = names, chosen: list[Table] = chosen, base: Efficiency = fitted
        ) -> Array:
            efficiency = replace(base, **dict(zip(names, np.exp(x).tolist(), strict=True)))
            return np.concatenate(
                [np.log(table.predict(efficiency) / table.seconds) * np.sqrt(400 / len(table.rows)) for table in chosen]
            )

        found = fit(residuals, begin, [value / 30 for value in begin], most)
        fitted = replace(fitted, **dict(zip(names, found, strict=True)))
    return fitted


def mean(sets: Sequence[Efficiency]) -> Efficiency:
    """Geometric mean of every coefficient: what to expect of a card that was not measured."""
    return Efficiency(
        **{name: float(np.exp(np.mean([np.log(getattr(one, name)) for one in sets]))) for name in coefficients("")}
    )


# Parameters of an engine that its steps may decide, with (start, least, most).
ENGINE_BOUNDS = {
    "step": (5e-3, 1e-5, 3e-2),
    "sequence": (2e-5, 1e-7, 1e-3),
    "layer": (5e-5, 1e-6, 1e-3),
    "host_prefill": (5e-4, 1e-5, 2e-3),
    "host_decode": (5e-4, 1e-5, 2e-3),
    "compute": (0.9, 0.4, 1.3),
    "memory": (1.0, 0.4, 1.15),
    "attention": (0.8, 0.1, 1.3),
    "paged": (0.8, 0.1, 1.3),
    "stream": (0.7, 0.05, 1.3),
    "link": (0.7, 0.1, 1.2),
    "link_latency": (1e-5, 1e-7, 2e-4),
    "link_huge": (2.0, 0.1, 50.0),
}


def fit_engine(groups: Sequence[Group], kernels: dict[str, Efficiency], names: Sequence[str]) -> Engine:
    """The engine under which ``groups`` were measured, each weighing the same; ``names`` of its parameters are free."""

    def residuals(x: Array) -> Array:
        engine = Engine(**dict(zip(names, np.exp(x).tolist(), strict=True)))
        return np.concatenate(
            [
                np.log(group.predict(kernels[group.gpu.kernels], engine) / group.seconds)
                * np.sqrt(30 / len(group.steps))
                for group in groups
            ]
        )

    start, low, high = zip(*(ENGINE_BOUNDS[name] for name in names), strict=True)
    return Engine(**dict(zip(names, fit(residuals, start, low, high), strict=True)))
