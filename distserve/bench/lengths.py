"""Prompt and output lengths: where they come from and how they are scaled.

Lengths are whole tokens, at least one. Scaling is always in proportion (every length of a workload by the same
factor), never clipping: a clipped workload has a spike at the limit that no real one has.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distserve.bench.errors import WorkloadError

Lengths = NDArray[np.int64]
_MAX_REDRAWS = 1000
_ROUNDING = 1e-9
"""Below the distance of a fitted length from the next whole number, above the error of computing it."""


@dataclass(frozen=True)
class Fixed:
    """Every length is ``tokens``."""

    tokens: int

    def draw(self, rng: np.random.Generator, num: int) -> Lengths:  # noqa: ARG002  the distributions' interface
        """``num`` lengths, int64 ``[num]``."""
        return np.full(num, self.tokens, dtype=np.int64)


@dataclass(frozen=True)
class Lognormal:
    """Lognormal lengths with arithmetic mean ``mean`` and shape ``sigma`` (so mu = ln(mean) - sigma^2 / 2).

    A draw above ``maximum`` is drawn again: the tail is cut off, not piled up at the maximum. The mean is that of the
    distribution before the cut.
    """

    mean: float
    sigma: float
    maximum: int | None = None

    def draw(self, rng: np.random.Generator, num: int) -> Lengths:
        """``num`` lengths, int64 ``[num]``."""
        mu = math.log(self.mean) - self.sigma**2 / 2
        return _redraw(lambda n: rng.lognormal(mu, self.sigma, n), num, self.maximum)


@dataclass(frozen=True)
class Normal:
    """Normal lengths; a draw below one token or above ``maximum`` is drawn again."""

    mean: float
    std: float
    maximum: int | None = None

    def draw(self, rng: np.random.Generator, num: int) -> Lengths:
        """``num`` lengths, int64 ``[num]``."""
        return _redraw(lambda n: rng.normal(self.mean, self.std, n), num, self.maximum)


LengthDistribution = Fixed | Lognormal | Normal


def _redraw(sample: Callable[[int], NDArray[np.float64]], num: int, maximum: int | None) -> Lengths:
    upper = maximum if maximum is not None else np.iinfo(np.int64).max
    out = np.zeros(num, dtype=np.int64)
    todo = np.arange(num)
    for _ in range(_MAX_REDRAWS):
        if not len(todo):
            return out
        drawn = np.rint(sample(len(todo)))
        out[todo] = np.maximum(drawn, 1).astype(np.int64) if maximum is None else drawn.astype(np.int64)
        bad = (out[todo] < 1) | (out[todo] > upper)
        todo = todo[bad]
    raise WorkloadError("the length distribution lies almost wholly outside its limits: raise max or lower mean")


def parse_lengths(text: str) -> LengthDistribution:
    """Read ``256``, ``fixed:256``, ``lognormal:mean=300,sigma=0.8,max=1500`` or ``normal:mean=1200,std=360``.

    Raises WorkloadError with what would be valid.
    """
    kind, _, rest = text.partition(":")
    if not rest and _is_count(kind):
        kind, rest = "fixed", kind
    if kind == "fixed":
        if not _is_count(rest):
            raise WorkloadError(f"{text!r}: a fixed length is a whole number of tokens, at least 1, e.g. fixed:256")
        return Fixed(int(rest))
    spread = {"lognormal": "sigma", "normal": "std"}.get(kind)
    if spread is None:
        raise WorkloadError(
            f"{text!r}: a length is a number, lognormal:mean=M,sigma=S[,max=X] or normal:mean=M,std=S[,max=X]"
        )
    values = _parse_pairs(text, rest, allowed=("mean", spread, "max"))
    for key in ("mean", spread):
        if key not in values:
            raise WorkloadError(f"{text!r}: {key}= is missing")
    if values["mean"] < 1 or values[spread] < 0:
        raise WorkloadError(f"{text!r}: mean must be at least 1 and {spread} not negative")
    maximum = int(values["max"]) if "max" in values else None
    if maximum is not None and maximum < 1:
        raise WorkloadError(f"{text!r}: max must be at least 1")
    if kind == "lognormal":
        return Lognormal(values["mean"], values["sigma"], maximum)
    return Normal(values["mean"], values["std"], maximum)


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) >= 1


def _parse_pairs(text: str, rest: str, allowed: tuple[str, ...]) -> dict[str, float]:
    values: dict[str, float] = {}
    for pair in rest.split(","):
        key, _, value = pair.partition("=")
        if key not in allowed:
            raise WorkloadError(f"{text!r}: {key!r} is not one of {', '.join(allowed)}")
        try:
            values[key] = float(value)
        except ValueError:
            raise WorkloadError(f"{text!r}: {key} must be a number, not {value!r}") from None
        if not math.isfinite(values[key]):
            raise WorkloadError(f"{text!r}: {key} must be finite")
    return values


def scale_lengths(lengths: Lengths, factor: float) -> Lengths:
    """Every length times ``factor``, rounded down, at least one token."""
    scaled: Lengths = np.maximum(np.floor(lengths * factor + _ROUNDING), 1).astype(np.int64)
    return scaled


def factor_to_fit(prompt_lens: Lengths, output_lens: Lengths, context: int, most: float = 1.0) -> float:
    """The one factor (at most ``most``) with which the longest prompt + output fits in ``context`` tokens.

    With ``scale_lengths`` no sum exceeds ``context``: rounding a length up to one token costs less than the fraction
    rounded off its partner. Raises WorkloadError when ``context`` has no room for a prompt and an output token.
    """
    if context < 2:
        raise WorkloadError(f"a context of {context} tokens has no room for a prompt token and an output token")
    longest = int((prompt_lens + output_lens).max(initial=1))
    return min(most, context / longest)
