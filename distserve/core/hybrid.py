"""Which prompts are computed where they will be decoded: the rule for deployments with prefill *and* mixed instances.

A prompt can be computed on a prefill instance, whose KV then moves to a mixed one (*remotely*), or on a mixed
instance at once (*locally*), which lengthens the steps that others decode in there. Both are predicted in the units of
the objective, ``SLO.ttft`` and ``SLO.tpot`` (seconds), from what instances report and what was sent to them since:

- ``T``, when the prompt's first token comes: (prompt tokens ahead of it, those of a step under way too, + its own
  uncached ones) / prompt tokens per second;
- ``I``, the interval between tokens on the mixed instance: a step without prompts takes ``s`` seconds and every prompt
  token adds ``e``, so with ``U`` prompt tokens in the last ``W`` seconds ``I = s / (1 - U e / W)``. ``W`` is a hundred
  tokens at the objective's TPOT, about as long as what a TPOT is averaged over.

The strain of an option is ``(T / ttft) ** 16 + (I / tpot) ** 16``: nearly the larger of the two, so what is closer to
its bound decides, and the other one where that is the same for both options. The lesser strain wins; a remote prompt
leaves ``I`` as it is. So a prompt is computed locally if prefill instances are so far behind that their ``T`` is closer
to its bound than decoding is, and not while decoding has nothing to spare. While both are far from their bounds, a
short prompt is computed locally, too: one that lengthens a step by a tenth at most is not worth moving.

Pure arithmetic; knows neither instances nor messages.
"""

from dataclasses import dataclass
from math import exp, inf

from distserve.core.config import SLO

_POWER = 16
_TOKENS = 100
"""Tokens over which a TPOT is taken to be averaged."""
_SHORT = 0.1
"""Of a step's time: what a short prompt adds to it at most."""
_FAR = 0.01
"""A strain below this is far from the bounds: both times are below three quarters of theirs."""


@dataclass(slots=True)
class RecentTokens:
    """Prompt tokens sent to an instance in the last ``window`` seconds; older ones fade away exponentially."""

    window: float
    _num_tokens: float = 0.0
    _at: float = 0.0

    def add(self, now: float, num_tokens: int) -> None:
        """``num_tokens`` are sent at ``now``."""
        self._num_tokens = self.at(now) + num_tokens
        self._at = now

    def at(self, now: float) -> float:
        """What counts of them at ``now``."""
        return self._num_tokens * exp((self._at - now) / self.window) if self._num_tokens else 0.0


def window_of(slo: SLO) -> float:
    """Seconds over which prompts are taken to slow decoding: ``W`` above."""
    return _TOKENS * slo.tpot


def interval(step_seconds: float, prompt_seconds: float, num_prompt_tokens: float, window: float) -> float:
    """``I`` above, seconds between two tokens of a sequence; infinite if prompts alone take all the time."""
    share = num_prompt_tokens * prompt_seconds / window
    return step_seconds / (1.0 - share) if share < 1.0 else inf


def strain(first_token: float, token_interval: float, slo: SLO) -> float:
    """How much of the objective an option takes, given its ``T`` and ``I`` in seconds: 1 or more misses it."""
    ttft, tpot = first_token / slo.ttft, token_interval / slo.tpot
    return float(ttft**_POWER + tpot**_POWER)


def is_short(num_tokens: int, step_seconds: float, prompt_seconds: float) -> bool:
    """Whether a prompt of ``num_tokens``, each adding ``prompt_seconds`` to a step, lengthens it by next to nothing."""
    return num_tokens * prompt_seconds <= _SHORT * step_seconds


def is_far(strain_of_option: float) -> bool:
    """Whether an option leaves both objectives far from their bounds."""
    return strain_of_option < _FAR
