"""A measured profile: step times of one model on one machine, and what a cluster adds to them. Evaluation only.

How the figures are taken is :mod:`distserve.engine.profile`'s and :mod:`distserve.cluster.costs`' business, how they
are fitted :mod:`distserve.engine.fit`'s. Nothing here reads files or clocks.

A step of B decoding sequences alone takes ``decode(B, c)`` seconds, c being the mean of their cached tokens: bilinear
between what was measured. One with prompt tokens takes ``prefill(T) + per_pair * own pairs + per_cached_pair * cached
pairs + per_prompt * (prompts - 1) + per_decode * B + per_context * context``, where T counts all tokens and ``prefill``
is piecewise linear. They are apart because engines run a pure decode batch on a shorter path. Of a step's pairs of
query and key, as many as one prompt of so many tokens has are counted as its own, the others as with cached tokens:
engines read those from blocks.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from distserve.core.config import ParallelConfig
from distserve.core.errors import ConfigError
from distserve.core.latency import StepShape

ONE_RANK = ParallelConfig()
"""The shape that is measured unless others are asked for."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One step shape as timed: seconds, the ``median`` and the ``least`` of ``count`` steps.

    ``change`` is what the first step of a decode batch takes more than the later ones. With several pipeline stages the
    times are those between the ends of steps that follow each other through a full pipeline, and ``through`` is the
    median time of a step alone in it, from its launch to its tokens.
    """

    shape: StepShape
    median: float
    least: float
    count: int
    change: float = 0.0
    through: float | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """A piecewise linear function of a count: ``values[i]`` seconds at ``knots[i]``, the knots rising.

    Beyond either end it goes on as in the piece next to it, but never below zero.
    """

    knots: tuple[int, ...]
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.knots or len(self.knots) != len(self.values) or list(self.knots) != sorted(set(self.knots)):
            raise ConfigError(f"a table needs as many rising knots as values, not {self.knots} and {self.values}")

    def __call__(self, count: float) -> float:
        """The value at ``count``."""
        knots, values = self.knots, self.values
        if len(knots) == 1:
            return values[0]
        piece = min(max(bisect_right(knots, count) - 1, 0), len(knots) - 2)
        return max(0.0, values[piece] + self.slope(piece) * (count - knots[piece]))

    def slope(self, piece: int) -> float:
        """Seconds per count between ``knots[piece]`` and the knot after it."""
        return (self.values[piece + 1] - self.values[piece]) / (self.knots[piece + 1] - self.knots[piece])


@dataclass(frozen=True, slots=True)
class Surface:
    """A bilinear function: ``values[b][c]`` seconds for ``batches[b]`` sequences of ``contexts[c]`` tokens each.

    Both axes rise. Beyond an edge it goes on as in the piece next to it, but never below zero.
    """

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    values: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if len(self.values) != len(self.batches):
            raise ConfigError(f"{len(self.batches)} batch sizes need as many rows, not {len(self.values)}")
        for column in range(len(self.contexts)):
            self.at_context(column)

    def at_context(self, column: int) -> Table:
        """Over batch sizes, at ``contexts[column]``."""
        return Table(self.batches, tuple(row[column] for row in self.values))

    def at_batch(self, num_sequences: int) -> Table:
        """Over mean contexts, for a batch of ``num_sequences``."""
        return Table(self.contexts, tuple(self.at_context(c)(num_sequences) for c in range(len(self.contexts))))


def own_pairs(num_tokens: int) -> int:
    """Pairs of query and key in one prompt of ``num_tokens`` without cached ones."""
    return num_tokens * (num_tokens + 1) // 2


@dataclass(frozen=True, slots=True)
class StepFit:
    """The coefficients, in seconds, of the formulas at the top of this module."""

    decode: Surface
    prefill: Table
    per_pair: float
    per_cached_pair: float
    per_prompt: float
    per_decode: float
    per_context: float

    def raised(self, per_step: float, per_sequence: float) -> "StepFit":
        """With ``per_step`` and ``per_sequence`` seconds more in every step."""
        decode = self.decode
        rows = [
            tuple(value + per_step + per_sequence * batch for value in row)
            for batch, row in zip(decode.batches, decode.values, strict=True)
        ]
        prefill = Table(self.prefill.knots, tuple(value + per_step + per_sequence for value in self.prefill.values))
        return replace(
            self,
            decode=replace(decode, values=tuple(rows)),
            prefill=prefill,
            per_prompt=self.per_prompt + per_sequence,
            per_decode=self.per_decode + per_sequence,
        )


class MeasuredStepTime:
    """Implements :class:`distserve.core.latency.StepTime` by a fit.

    With ``num_stages`` pipeline stages ``fit`` is of the busiest one and ``through`` of a step that is alone on its way
    through all of them; a hand-over is what is left between the two, and below zero where other stages are shorter.
    Tables are expanded as they are needed, so that a step costs a look-up.
    """

    def __init__(self, fit: StepFit, through: StepFit | None = None, num_stages: int = 1) -> None:
        assert (through is None) == (num_stages == 1)
        self.fit = fit
        self._through = None if through is None else MeasuredStepTime(through)
        self._num_stages = num_stages
        self._decode: dict[int, list[tuple[float, float]]] = {}
        """By batch size, for each piece between context knots: (slope per token of total context, seconds at 0)."""
        self._inner_contexts = fit.decode.contexts[1:-1]
        self._prefill = [fit.prefill(count) for count in range(2 * fit.prefill.knots[-1] + 1)]

    def seconds(self, shape: StepShape) -> float:
        """See :class:`distserve.core.latency.StepTime`."""
        num_decodes = shape.num_decodes
        if shape.num_prefill_tokens == 0:
            if num_decodes == 0:
                return 0.0
            pieces = self._decode.get(num_decodes) or self._expand(num_decodes)
            context = shape.decode_context
            slope, base = pieces[bisect_right(self._inner_contexts, context / num_decodes)]
            return base + slope * context
        num_prefill_tokens, pairs = shape.num_prefill_tokens, shape.prefill_pairs
        count = num_prefill_tokens + num_decodes
        fit = self.fit
        num_cached = max(0, pairs - own_pairs(num_prefill_tokens))
        return (
            (self._prefill[count] if count < len(self._prefill) else fit.prefill(count))
            + fit.per_pair * (pairs - num_cached)
            + fit.per_cached_pair * num_cached
            + fit.per_prompt * (shape.num_prefills - 1)
            + fit.per_decode * num_decodes
            + fit.per_context * shape.decode_context
        )

    def handover(self, shape: StepShape) -> float:
        """See :class:`distserve.core.latency.StepTime`."""
        if self._through is None:
            return 0.0
        num_stages = self._num_stages
        return (self._through.seconds(shape) - num_stages * self.seconds(shape)) / (num_stages - 1)

    def _expand(self, num_decodes: int) -> list[tuple[float, float]]:
        table = self.fit.decode.at_batch(num_decodes)
        pieces = []
        for i in range(max(1, len(table.knots) - 1)):
            slope = table.slope(i) if len(table.knots) > 1 else 0.0
            pieces.append((slope / num_decodes, table.values[i] - slope * table.knots[i]))
        self._decode[num_decodes] = pieces
        return pieces


@dataclass(frozen=True, slots=True)
class Residuals:
    """How far a fit is from the ``count`` measurements it was made of: relative errors, signs dropped."""

    count: int
    median: float
    p90: float
    worst: float


def residuals(step_time: MeasuredStepTime, measurements: Sequence[Measurement]) -> Residuals:
    """Errors of ``step_time`` over ``measurements``, of which there is at least one."""
    errors = sorted(abs(step_time.seconds(m.shape) / m.median - 1) for m in measurements)
    last = len(errors) - 1
    return Residuals(len(errors), errors[last // 2], errors[round(0.9 * last)], errors[last])


@dataclass(frozen=True, slots=True)
class ClusterCosts:
    """What a running cluster adds to the engine's own times, in seconds.

    ``step`` and ``step_per_sequence`` are added to every step by an instance's scheduler, driver and messages.
    ``message`` is from one part to another. ``request`` and ``request_per_token`` (of its prompt) pass before a
    client's request is with its owner, ``token`` before an emitted token is with the client. A KV pull takes
    ``pull`` and ``pull_per_byte``.

    The others are processor time of all but the engines: client, API, router, and the instances' further threads. They
    are no delays, but on a machine whose cores are all busy the steps wait for them. ``cpu_per_pull`` and
    ``cpu_per_pulled_token`` are spent beside the decode instance's engine on taking KV in. ``idle_cores`` are busy
    without any request; ``cpu_per_request``, ``cpu_per_prompt_token``, ``cpu_per_step`` and ``cpu_per_token`` (emitted)
    come on top. ``waking`` is what a request that comes after a pause takes longer to its first token.
    """

    step: float
    step_per_sequence: float
    message: float
    request: float
    request_per_token: float
    token: float
    pull: float
    pull_per_byte: float
    cpu_per_request: float
    cpu_per_prompt_token: float
    cpu_per_step: float
    cpu_per_token: float
    idle_cores: float
    cpu_per_pull: float = 0.0
    cpu_per_pulled_token: float = 0.0
    waking: float = 0.0


@dataclass(frozen=True, slots=True)
class ShapeProfile:
    """What instances of shape ``parallel`` take for a step; ``residuals`` by kind of step.

    With several pipeline stages ``fit`` is of the busiest one, and ``through`` of a step alone in the pipeline.
    """

    parallel: ParallelConfig
    fit: StepFit
    measurements: tuple[Measurement, ...] = ()
    residuals: dict[str, Residuals] = field(default_factory=dict)
    through: StepFit | None = None

    def __post_init__(self) -> None:
        if (self.through is None) != (self.parallel.pp == 1):
            raise ConfigError(
                f"a profile of {shape_name(self.parallel)} has to say what a step takes through all pipeline stages if "
                "and only if there are several"
            )

    def step_time(self, costs: ClusterCosts | None) -> MeasuredStepTime:
        """The step times, with what a cluster adds to a step if that was measured."""
        fit, through = self.fit, self.through
        if costs is not None:
            fit = fit.raised(costs.step, costs.step_per_sequence)
            through = None if through is None else through.raised(costs.step, costs.step_per_sequence)
        return MeasuredStepTime(fit, through, self.parallel.pp)


@dataclass(frozen=True)
class Profile:
    """A model on a machine, as measured at ``created`` (ISO 8601), for instances of each of ``shapes``.

    ``machine`` and ``limits`` say with what: processor, memory, versions; KV tokens and the grid's extent.
    ``model_digest`` is the SHA-256 of the model's config.json. ``token_bytes`` is the KV of one token. ``cluster`` is
    None if only the engine was measured; it is measured with instances of one rank.
    """

    format: str
    created: str
    machine: dict[str, str | int | float]
    model: str
    model_digest: str
    dtype: str
    num_threads: int
    block_size: int
    token_bytes: int
    limits: dict[str, int]
    shapes: tuple[ShapeProfile, ...]
    cluster: ClusterCosts | None = None

    def __post_init__(self) -> None:
        if not self.shapes:
            raise ConfigError("a profile needs a shape of instance that was measured")

    def shape(self, parallel: ParallelConfig) -> ShapeProfile:
        """What was measured of instances of shape ``parallel``.

        Raises:
            ConfigError: nothing was; says what was, and how to measure more.
        """
        for shape in self.shapes:
            if shape.parallel == parallel:
                return shape
        measured = [shape_name(shape.parallel) for shape in self.shapes]
        options = " ".join(f"--shape {name}" for name in (*measured, shape_name(parallel)))
        raise ConfigError(
            f"the profile of {self.model} has instances of tp x pp {', '.join(measured)}, not {shape_name(parallel)}: "
            f"measure that by `distserve profile MODEL {options}`"
        )

    def step_time(self, parallel: ParallelConfig = ONE_RANK) -> MeasuredStepTime:
        """Step times of instances of shape ``parallel``, with what a cluster adds to them if that was measured.

        Raises:
            ConfigError: as :meth:`shape` does.
        """
        return self.shape(parallel).step_time(self.cluster)


def shape_name(parallel: ParallelConfig) -> str:
    """``2x1`` for two shards in one stage, as ``distserve profile --shape`` takes it."""
    return f"{parallel.tp}x{parallel.pp}"


FORMAT = "distserve-profile/3"
"""What ``Profile.format`` says of this version of the file."""
