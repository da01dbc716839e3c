"""Sound bounds: what no queue, no interference and no network could improve on. They prune before any simulation.

- **Latency without a queue.** A lone prompt takes its chunks one after the other through every stage; a lone sequence
  takes a step of one per token. The share of requests within the objective on such a machine bounds attainment.
- **Capacity.** Prompts cost no less per token than in the largest batch a step may have; decodes no less per sequence
  than in the largest batch that memory and limits allow. In a steady state no rate exceeds what this serves. Beside
  prefill instances a mixed one is spared at most what those can compute of the prompts they are best at.

Both rest on what holds for every source of step times here: a step with more work takes no less time, and a larger
batch of prompts no more time per token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from distserve.bench.lengths import Lengths
from distserve.core.config import PrefillPolicy, Role
from distserve.core.latency import StepShape, StepTime
from distserve.core.topology import PlacedInstance, Placement
from placement.offered import Offered
from placement.problem import Problem
from placement.shapes import Shape
from simulator.results import Floats

_GRID = 48


@dataclass(frozen=True)
class ShapeBound:
    """``capacity`` in requests/s of one instance, and what requests meet on it that are alone there.

    ``decode_capacity`` is what it could serve if it had nothing to do but decode; infinite if it does not decode.
    ``attainment`` is the share within both limits, ``memory`` the share whose KV fits at all; ``ttft`` and ``tpot``
    are the lone values (seconds) at the target's quantile.
    """

    capacity: float
    decode_capacity: float
    attainment: float
    ttft: float
    tpot: float
    memory: float


def bound_shape(problem: Problem, offered: Offered, shape: Shape) -> ShapeBound:
    """The bounds of one kind of instance; the phase it does not serve counts as instant."""
    step_time = problem.latency.step_time(shape.parallel, stages_share_node=shape.nodes == 1)
    prompts, outputs = offered.sample
    target = problem.slo.attainment
    pp = shape.parallel.pp
    ttft = np.zeros(len(prompts))
    tpot = np.zeros(len(prompts))
    if shape.role is not Role.DECODE:
        ttft = _interpolated(prompts, lambda length: lone_prefill(step_time, shape, length))
    if shape.role is not Role.PREFILL:
        lone = _interpolated(prompts + outputs // 2, lambda length: lone_decode(step_time, pp, length))
        tpot = np.where(outputs > 1, lone, 0.0)
    held = prompts if shape.role is Role.PREFILL else prompts + outputs
    fits = held <= shape.kv.num_tokens
    within = (ttft <= problem.slo.ttft) & (tpot <= problem.slo.tpot) & fits
    whole, decoding = capacities(problem, offered, shape, step_time)
    return ShapeBound(
        capacity=whole,
        decode_capacity=decoding,
        attainment=float(within.mean()),
        ttft=float(np.quantile(ttft, target)),
        tpot=float(np.quantile(tpot, target)),
        memory=float(fits.mean()),
    )


def lone_prefill(step_time: StepTime, shape: Shape, length: int) -> float:
    """Seconds from the arrival of a lone prompt of ``length`` tokens to its first token on an idle instance."""
    pp = shape.parallel.pp
    budget = length if shape.policy is PrefillPolicy.WHOLE_PROMPT else shape.max_batch_tokens
    seconds, done = 0.0, 0
    while done < length:
        count = min(budget, length - done)
        step = StepShape(count, count * (2 * done + count + 1) // 2, num_prefills=1)
        seconds += pp * step_time.seconds(step) + (pp - 1) * step_time.handover(step)
        done += count
    return seconds


def lone_decode(step_time: StepTime, pp: int, context: int) -> float:
    """Seconds of one token of a lone sequence of ``context`` tokens."""
    step = StepShape(num_decodes=1, decode_context=context)
    return pp * step_time.seconds(step) + (pp - 1) * step_time.handover(step)


def capacities(problem: Problem, offered: Offered, shape: Shape, step_time: StepTime) -> tuple[float, float]:
    """Requests/s that no arrival pattern lets one instance exceed in a steady state: in all, and of decoding alone.

    The busiest stage works ``seconds`` per request: its prompt's share of a full batch, and of each of its decode steps
    its share of the largest batch.
    """
    prompts, outputs = offered.sample
    prefilling = decoding = beside = 0.0
    if shape.role is not Role.DECODE:
        prefilling = _prefill_seconds(shape, step_time, prompts)
    if shape.role is not Role.PREFILL:
        num_steps = float((outputs - 1).mean())
        decoding = beside = _decode_seconds(problem, shape, step_time, prompts, outputs) * num_steps
        if shape.role is Role.MIXED and shape.policy is PrefillPolicy.SPLITFUSE:
            # Decodes ride along with prompts: only what they add to a step counts.
            beside = min(decoding, _riding_seconds(shape, step_time, prompts, outputs) * num_steps)
    return _per_second(prefilling + beside), _per_second(decoding)


def _per_second(seconds: float) -> float:
    return 1.0 / seconds if seconds > 0 else float("inf")


def relief(problem: Problem, offered: Offered, prefill: Shape, mixed: Shape) -> float:
    """Seconds of its own that a second of a prefill instance spares a mixed one, at most.

    That is for the lengths which the prefill instance is best at: nobody says that it gets average prompts.
    """
    prompts, _ = offered.sample
    lengths = np.unique(np.quantile(prompts, np.linspace(0, 1, _GRID)).astype(np.int64))
    ours, theirs = (
        problem.latency.step_time(shape.parallel, stages_share_node=shape.nodes == 1) for shape in (mixed, prefill)
    )
    return max(
        _prefill_seconds(mixed, ours, length) / _prefill_seconds(prefill, theirs, length)
        for length in np.split(lengths, len(lengths))
    )


def _prefill_seconds(shape: Shape, step_time: StepTime, prompts: Lengths) -> float:
    """A request's share of the first stage's time: its tokens' share of a full batch of such prompts."""
    tokens = float(prompts.sum())
    pairs = float((prompts * (prompts + 1.0) / 2).sum())
    budget = max(shape.max_batch_tokens, int(prompts.max()) if shape.policy is PrefillPolicy.WHOLE_PROMPT else 1)
    count = max(round(len(prompts) * budget / tokens), 1)
    full = StepShape(budget, int(pairs * budget / tokens), num_prefills=count)
    return step_time.seconds(full) * tokens / budget / len(prompts)


def _decode_seconds(problem: Problem, shape: Shape, step_time: StepTime, prompts: Lengths, outputs: Lengths) -> float:
    """A token's share of the first stage's time in the largest batch that memory holds.

    In a steady state contexts are those of the requests weighted by how many steps they stay; each holds at least its
    prompt.
    """
    steps = np.maximum(outputs - 1, 0)
    if not steps.sum():
        return 0.0
    context = float(((prompts + outputs / 2) * steps).sum() / steps.sum())
    held = min(problem.limits.max_batch_size, max(shape.kv.num_tokens // max(context, 1.0), 1))
    most = max(int(held) // shape.parallel.pp, 1)
    # Fits by pieces are not quite monotonous in the batch: the best of a grid.
    batches = {most, *(max(most * eighth // 8, 1) for eighth in range(1, 8))}
    return min(
        step_time.seconds(StepShape(num_decodes=batch, decode_context=int(batch * context))) / batch
        for batch in batches
    )


def _riding_seconds(shape: Shape, step_time: StepTime, prompts: Lengths, outputs: Lengths) -> float:
    budget = shape.max_batch_tokens
    mean = float(prompts.mean())
    context = mean + float(outputs.mean()) / 2
    pairs = int(budget * (mean + 1) / 2)
    batch = max(budget // 8, 1)
    alone = step_time.seconds(StepShape(budget, pairs, num_prefills=1))
    ridden = step_time.seconds(StepShape(budget, pairs, batch, int(batch * context), 1))
    return max(ridden - alone, 0.0) / batch


def network_capacity(problem: Problem, offered: Offered, placement: Placement) -> float:
    """Requests/s whose KV the network cards can move; infinite if requests may need none of them.

    Mixed instances can compute prompts where they decode. Else every pull moves at least the share of layers that is
    apart in the best pair of instances. What all cards of the nodes with prefill instances send, and those with decode
    instances receive, bounds the rate.
    """
    sources, targets = placement.of(Role.PREFILL), placement.of(Role.DECODE)
    if placement.of(Role.MIXED):
        return float("inf")
    apart = min(_apart(source, target, problem.model.num_layers) for source in sources for target in targets)
    prompts, outputs = offered.sample
    moved = float(np.where(outputs > 1, prompts, 0).mean()) * problem.model.kv.bytes_per_token * apart
    if moved <= 0:
        return float("inf")
    nodes = min(len({gpu.node for instance in pool for gpu in instance.gpus}) for pool in (sources, targets))
    return nodes * problem.cluster.nics_per_node * problem.cluster.inter_node_bandwidth / moved


def _apart(source: PlacedInstance, target: PlacedInstance, num_layers: int) -> float:
    """Share of the layers that two instances hold on different nodes."""
    pairs = (
        (
            source.stage(layer * source.spec.parallel.pp // num_layers)[0].node,
            target.stage(layer * target.spec.parallel.pp // num_layers)[0].node,
        )
        for layer in range(num_layers)
    )
    return sum(here != there for here, there in pairs) / num_layers


def _interpolated(lengths: Lengths, seconds: Callable[[int], float]) -> Floats:
    """``seconds`` of every length, computed on a grid of quantiles and linear between them."""
    grid = np.unique(np.quantile(lengths, np.linspace(0, 1, _GRID)).astype(np.int64))
    values = np.array([seconds(int(length)) for length in grid])
    found: Floats = np.interp(lengths, grid, values)
    return found
