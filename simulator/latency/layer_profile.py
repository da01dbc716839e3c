"""A card's measured layer times, summed into steps.

Reads the profiles that LLMServingSim's profiler writes for one model on one card: microseconds of each layer of a
transformer's block by number of tokens (``dense.csv``), of the head and the sampler by number of sequences
(``per_sequence.csv``), and of attention by (chunk of a prompt, its cached tokens, decoding sequences, their context)
(``attention.csv``). A step is the sum of its layers; between measured points times are interpolated linearly.

What a sum of kernel times cannot know is the engine around it: :class:`EngineCosts`.
"""

import csv
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distserve.core.config import ParallelConfig
from distserve.core.errors import ConfigError
from distserve.core.latency import StepShape, StepTime

ONCE = frozenset({"embedding", "final_layernorm", "lm_head", "sampler"})
"""Layers that run once a step; the others run in every block of the model."""

TWICE = frozenset({"layernorm"})
"""Layers that run twice in every block: before attention and before the MLP."""

_MICROSECOND = 1e-6

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class EngineCosts:
    """What serving adds to kernels measured one by one.

    ``per_step`` is the seconds a step takes beyond the sum of its kernels: what the GPU idles from one to the next,
    less the gaps between kernels that a captured graph does not have. Decode attention was measured over contexts of
    equal lengths; over unequal ones the blocks of the longest run alone at last: ``unequal_contexts`` are seconds for
    each token that the longest context of a step exceeds the mean one by, and twice that in a step with prompts, where
    contexts are not split over blocks. ``graph_sizes`` are the batch sizes of the captured CUDA graphs, ascending: a
    step of fewer tokens than the largest is padded to the next of them.
    """

    per_step: float = 0.0
    unequal_contexts: float = 0.0
    graph_sizes: tuple[int, ...] = ()


class _Curve:
    """A piecewise linear function through measured points, extended by its outer pieces, never below zero."""

    def __init__(self, points: Points) -> None:
        ordered = sorted(points)
        self.xs = [x for x, _ in ordered]
        self.ys = [y for _, y in ordered]

    def __call__(self, x: float) -> float:
        low, high, weight = _bracket(self.xs, x)
        return max(0.0, self.ys[low] + weight * (self.ys[high] - self.ys[low]))


def _bracket(xs: Sequence[float], x: float) -> tuple[int, int, float]:
    """(lower index, upper index, weight of the upper one); the weight leaves [0, 1] outside ``xs``."""
    if len(xs) == 1:
        return 0, 0, 0.0
    high = min(max(bisect_left(xs, x), 1), len(xs) - 1)
    return high - 1, high, (x - xs[high - 1]) / (xs[high] - xs[high - 1])


@dataclass(frozen=True, slots=True)
class _Grid:
    """Measured times over several axes, outermost first. What was measured may differ from branch to branch."""

    xs: tuple[float, ...]
    branches: tuple["_Grid | float", ...]

    @staticmethod
    def of(times: Mapping[tuple[float, ...], float]) -> "_Grid":
        """The grid of ``times`` by coordinates."""
        xs = sorted({point[0] for point in times})
        branches: list[_Grid | float] = []
        for x in xs:
            inner = {point[1:]: time for point, time in times.items() if point[0] == x}
            branches.append(inner[()] if () in inner else _Grid.of(inner))
        return _Grid(tuple(xs), tuple(branches))

    def at(self, point: tuple[float, ...]) -> float:
        """Linear in every axis, extended by the outer pieces."""
        low, high, weight = _bracket(self.xs, point[0])
        first = _value(self.branches[low], point)
        return first if weight == 0.0 else first + weight * (_value(self.branches[high], point) - first)


def _value(branch: "_Grid | float", point: tuple[float, ...]) -> float:
    return branch.at(point[1:]) if isinstance(branch, _Grid) else branch


class LayerProfileStepTime:
    """Step times of one rank that holds the whole model: the sum of its layers and the engine's costs."""

    def __init__(
        self,
        *,
        num_layers: int,
        dense: Mapping[str, Points],
        per_sequence: Mapping[str, Points],
        attention: Mapping[tuple[float, ...], float],
        costs: EngineCosts = EngineCosts(),
    ) -> None:
        self._num_layers = num_layers
        self._costs = costs
        decodes = {point[2:]: time for point, time in attention.items() if point[0] == 0}
        chunks = {point: time for point, time in attention.items() if point[0] > 0}
        self._decode_attention = _Grid.of(decodes)
        self._chunk_attention = _Grid.of(chunks)
        self._launch = min(chunks.values())
        self._dense = self._tabulate(dense)
        self._per_sequence = self._tabulate(per_sequence)

    def _tabulate(self, layers: Mapping[str, Points]) -> list[float]:
        """Seconds of all these layers for every number of tokens (or sequences) up to the largest measured."""
        size = max(int(max(x for x, _ in points)) for points in layers.values()) + 1
        total = [0.0] * size
        for name, points in layers.items():
            curve, calls = _Curve(points), self._calls(name)
            for x in range(1, size):
                total[x] += calls * curve(x) * _MICROSECOND
        return total

    def _calls(self, layer: str) -> int:
        if layer in ONCE:
            return 1
        return self._num_layers * (2 if layer in TWICE else 1)

    def seconds(self, shape: StepShape) -> float:
        """See :class:`distserve.core.latency.StepTime`."""
        num_tokens = shape.num_prefill_tokens + shape.num_decodes
        sizes = self._costs.graph_sizes
        if sizes and num_tokens <= sizes[-1]:
            num_tokens = sizes[bisect_left(sizes, num_tokens)]
        return (
            self._costs.per_step
            + self._costs.unequal_contexts * _inequality(shape)
            + _beyond(self._dense, num_tokens)
            + _beyond(self._per_sequence, shape.num_prefills + shape.num_decodes)
            + self._num_layers * self._attention(shape) * _MICROSECOND
        )

    def handover(self, shape: StepShape) -> float:  # noqa: ARG002 -- the interface's
        """None: there is one stage."""
        return 0.0

    def _attention(self, shape: StepShape) -> float:
        """Microseconds of one layer's attention.

        Several prompts are taken as equal ones with the same query tokens and (query, key) pairs in all; each but the
        first costs what its chunk takes beyond the launch that they share.
        """
        context = shape.decode_context / shape.num_decodes if shape.num_decodes else 0.0
        if shape.num_prefill_tokens == 0:
            return self._decode_attention.at((shape.num_decodes, context))
        num = shape.num_prefills
        chunk = shape.num_prefill_tokens / num
        cached = max(0.0, shape.prefill_pairs / shape.num_prefill_tokens - (chunk + 1) / 2)
        time = self._chunk_attention.at((chunk, cached, shape.num_decodes, context))
        if num > 1:
            time += (num - 1) * max(0.0, self._chunk_attention.at((chunk, cached, 0, 0)) - self._launch)
        return time


def _inequality(shape: StepShape) -> float:
    """Tokens by which the longest decoding context exceeds the mean one; twice as many in a step with prompts."""
    if shape.num_decodes == 0:
        return 0.0
    tokens = max(0.0, shape.longest_context - shape.decode_context / shape.num_decodes)
    return 2 * tokens if shape.num_prefills else tokens


def _beyond(table: list[float], count: int) -> float:
    """``table[count]``; past its end in proportion to the count."""
    last = len(table) - 1
    return table[count] if count <= last else table[last] * count / last


@dataclass(frozen=True, slots=True)
class LayerProfile:
    """A latency model of one card: ``directory`` holds ``attention.csv``, ``dense.csv`` and ``per_sequence.csv``.

    Measured on one rank with the whole model; a latency model in the sense of
    :class:`simulator.latency.interface.LatencyModel`.
    """

    directory: Path
    card: str
    num_layers: int
    costs: EngineCosts = EngineCosts()

    @property
    def source(self) -> str:
        """Where the figures come from."""
        return f"layer times measured on {self.card}"

    def step_time(self, parallel: ParallelConfig, *, stages_share_node: bool = True) -> StepTime:  # noqa: ARG002
        """The step times of one rank.

        Raises ConfigError for any shape but one rank, and for files that are missing or not of the format.
        """
        if parallel.num_ranks != 1:
            raise ConfigError(
                f"{self.source} know no collectives: tp 1 and pp 1 only, not tp {parallel.tp} and pp {parallel.pp}"
            )
        attention = {
            tuple(numbers[:-1]): numbers[-1]
            for numbers in (_numbers(*row) for row in _rows(self.directory / "attention.csv", 5))
        }
        if not any(point[0] > 0 for point in attention) or not any(point[0] == 0 for point in attention):
            raise ConfigError(f"{self.directory / 'attention.csv'}: no chunks of prompts, or no decode steps, in it")
        return LayerProfileStepTime(
            num_layers=self.num_layers,
            dense=_layers(self.directory / "dense.csv"),
            per_sequence=_layers(self.directory / "per_sequence.csv"),
            attention=attention,
            costs=self.costs,
        )


def _layers(path: Path) -> dict[str, list[tuple[float, float]]]:
    """The measured points of each layer of a file (layer, count, microseconds)."""
    layers: dict[str, list[tuple[float, float]]] = {}
    for place, (layer, *rest) in _rows(path, 3):
        count, time = _numbers(place, rest)
        layers.setdefault(layer, []).append((count, time))
    return layers


def _rows(path: Path, num_columns: int) -> Iterator[tuple[str, list[str]]]:
    """Every row of a CSV file below its header, with its place in words."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    for number, row in enumerate(csv.reader(lines[1:]), start=2):
        place = f"{path}, line {number}"
        if len(row) != num_columns:
            raise ConfigError(f"{place}: {num_columns} columns expected, found {len(row)}")
        yield place, row


def _numbers(place: str, cells: Sequence[str]) -> list[float]:
    try:
        return [float(cell) for cell in cells]
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from error
