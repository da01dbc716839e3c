"""DistServe's published A100 fits as a source of latencies.

The files are ``simdistserve/estimators/profile_data/profiler-a100-80g.*.json`` of LLMServe/DistServe (Apache-2.0), for
OPT-13B and OPT-66B. As its simulator evaluates them, in milliseconds, over prompts of ``l`` tokens and ``bs`` decodes::

    prefill = (a + b * sum(l) + c * sum(l^2)) / pp + pp
    decode  = (a + b * sum(context) + c * bs) / pp      # other coefficients from a threshold of bs on
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from distserve.core.config import ParallelConfig
from distserve.core.errors import ConfigError
from distserve.core.latency import StepShape
from simulator.latency.runs import affine_ends


@dataclass(frozen=True, slots=True)
class DistServeStepTime:
    """Seconds per stage by the fits; coefficients are in seconds, already divided by the number of stages.

    The fits know prompts alone and decodes alone. A step of both takes the prompts' time and the decodes' share without
    their constant: weights are read once and the step is launched once.
    """

    prefill: tuple[float, float, float]
    decode: tuple[float, float, float]
    decode_large: tuple[float, float, float]
    threshold: int

    def seconds(self, shape: StepShape) -> float:
        """See :class:`distserve.core.latency.StepTime`."""
        num_decodes = shape.num_decodes
        time = 0.0
        if num_decodes:
            base, per_context, per_sequence = self.decode if num_decodes < self.threshold else self.decode_large
            time = per_context * shape.decode_context + per_sequence * num_decodes
            if not shape.num_prefill_tokens:
                return time + base
        base, per_token, per_square = self.prefill
        tokens = shape.num_prefill_tokens
        return time + base + per_token * tokens + per_square * (2 * shape.prefill_pairs - tokens)

    def decode_ends(self, num_decodes: int, context: int, num_steps: int, start: float) -> list[float]:
        """See :class:`simulator.latency.interface.DecodeRunTime`."""
        base, per_context, per_sequence = self.decode if num_decodes < self.threshold else self.decode_large
        return affine_ends(start, num_steps, num_decodes, context, per_context, per_sequence * num_decodes, base)

    def handover(self, shape: StepShape) -> float:  # noqa: ARG002 -- the interface's
        """None: the fits count it among a stage's time."""
        return 0.0


@dataclass(frozen=True, slots=True)
class DistServeProfile:
    """Fits of one model on the A100-80G, for the tensor-parallel degrees that were measured."""

    source: str
    model: str
    fits: dict[int, Any]

    @classmethod
    def load(cls, path: str | Path, model: str) -> Self:
        """Read the fits of ``model`` (``facebook/opt-13b``, or just ``opt-13b``).

        Raises ConfigError if the file is not such a profile or lacks the model.
        """
        path = Path(path)
        try:
            profile = json.loads(path.read_text(encoding="utf-8"))
            models = {name.split("/")[-1]: (name, fits) for name, fits in profile.items()}
            short = model.rsplit("/", maxsplit=1)[-1].lower()
            if short not in models:
                raise ConfigError(f"{path} has no fits of {model}; it has {', '.join(sorted(models))}")
            name, fits = models[short]
            return cls(
                f"DistServe's fits of {name} on A100-80G ({path.name})", name, {int(tp): fits[tp] for tp in fits}
            )
        except OSError as error:
            raise ConfigError(f"cannot read DistServe's profile {path}: {error.strerror or error}") from error
        except (ValueError, AttributeError, TypeError) as error:
            raise ConfigError(f"{path} is not a profile of DistServe's simulator: {error}") from error

    def step_time(self, parallel: ParallelConfig, *, stages_share_node: bool = True) -> DistServeStepTime:  # noqa: ARG002
        """See :class:`simulator.latency.interface.LatencyModel`; the fits do not say where the stages are."""
        if parallel.tp not in self.fits:
            known = ", ".join(str(tp) for tp in sorted(self.fits))
            raise ConfigError(f"{self.source} know tp {known} of {self.model}, not tp {parallel.tp}")
        fit, pp = self.fits[parallel.tp], parallel.pp

        def scaled(coefficients: list[float], constant: float = 0.0) -> tuple[float, float, float]:
            base, first, second = (value / 1000 / pp for value in coefficients)
            return base + constant / 1000, first, second

        return DistServeStepTime(
            scaled(fit["prefill"], constant=pp),
            scaled(fit["decoding_smallbs"]),
            scaled(fit["decoding_largebs"]),
            fit["decoding_large_small_bs_threshold"],
        )
