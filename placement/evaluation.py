"""From measurements to what a plan says of a placement: the use of its parts, and what binds it."""

from collections.abc import Sequence

import numpy as np

from distserve.core.config import Role
from distserve.core.topology import Placement
from placement.candidates import Candidate
from placement.goodput import Goodput
from placement.measure import Measurement
from placement.plan import Evaluation, InstanceUse, Interval, LinkUse
from placement.problem import Problem
from simulator.results import Simulation

_FULL_MEMORY = 0.93
_FULL_LINK = 0.9
_BUSY = 0.8


def evaluate(
    problem: Problem,
    label: str,
    placement: Placement,
    goodput: Goodput,
    at: Measurement | None = None,
    candidate: Candidate | None = None,
) -> Evaluation:
    """``goodput`` in the plan's words; ``at`` is the measurement at the planned rate (None: the one at the goodput)."""
    shown = at if at is not None else goodput.nearest(goodput.low or goodput.interval.estimate)
    points = {measurement.point.rate: measurement.point for measurement in goodput.measured}
    points[shown.point.rate] = shown.point
    interval = goodput.interval
    if shown.point.surely_holds(problem.slo.attainment):
        # Whatever a search with shorter runs made of it: this rate is held.
        rate = shown.point.rate
        interval = Interval(max(interval.estimate, rate), max(interval.low, rate), max(interval.high, rate))
    return Evaluation(
        label=label,
        placement=placement,
        policy=placement.instances[0].spec.scheduler.policy,
        goodput=interval,
        point=shown.point,
        curve=tuple(points[rate] for rate in sorted(points)),
        instances=instance_uses(problem, placement, shown.last),
        links=link_uses(shown.last),
        binding=binding_constraint(problem, placement, goodput),
        candidate=candidate,
    )


def instance_uses(problem: Problem, placement: Placement, simulation: Simulation) -> tuple[InstanceUse, ...]:
    """What every instance did in a run, in the placement's order."""
    duration = max(float(simulation.timelines.arrival[-1]), 1e-9) if len(simulation.timelines) else 1.0
    usages = {usage.instance_id: usage for usage in simulation.instances}
    sent, received = _kv_moved(problem, simulation)
    uses = []
    for instance in placement.instances:
        spec = instance.spec
        usage = usages[spec.instance_id]
        ranks_bytes = problem.model.kv_bytes_per_token(spec.parallel) * spec.parallel.num_ranks
        uses.append(
            InstanceUse(
                instance_id=spec.instance_id,
                role=spec.role,
                parallel=spec.parallel,
                gpus=instance.gpus,
                busy=min(usage.busy / duration, 1.0),
                mean_batch=usage.mean_batch,
                peak_kv_blocks=usage.peak_kv_blocks,
                num_kv_blocks=usage.num_kv_blocks,
                kv_bytes=spec.kv.num_tokens * ranks_bytes,
                num_preempted=usage.num_preempted,
                kv_sent=sent[spec.instance_id],
                kv_received=received[spec.instance_id],
            )
        )
    return tuple(uses)


def _kv_moved(problem: Problem, simulation: Simulation) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes/s of KV that each instance sent and received in a run, by the requests that were handed over."""
    lines, names = simulation.timelines, [usage.instance_id for usage in simulation.instances]
    moved = np.isfinite(lines.migration_end) & (lines.prefill_id >= 0) & (lines.decode_id >= 0)
    rates = lines.prompt_tokens[moved] * (problem.model.kv.bytes_per_token / max(simulation.duration, 1e-9))
    sent, received = (
        dict(zip(names, np.bincount(ends[moved], rates, len(names)).tolist(), strict=True))
        for ends in (lines.prefill_id, lines.decode_id)
    )
    return sent, received


def link_uses(simulation: Simulation) -> tuple[LinkUse, ...]:
    """What went over every link in a run."""
    duration = max(simulation.duration, 1e-9)
    return tuple(
        LinkUse(link.name, link.capacity, link.num_bytes / duration, min(link.busy / duration, 1.0))
        for link in simulation.links
    )


def binding_constraint(problem: Problem, placement: Placement, goodput: Goodput) -> str:
    """What fails first above the goodput: which limit, and what stands behind it in that run."""
    target = problem.slo.attainment
    above = [measurement for measurement in goodput.measured if not measurement.point.holds(target)]
    if not above:
        return _capacity(instance_uses(problem, placement, goodput.measured[-1].last))
    first = above[0]
    point = first.point
    uses = instance_uses(problem, placement, first.last)
    full_links = [link for link in link_uses(first.last) if link.share > _FULL_LINK]
    if full_links:
        return f"network: {full_links[0].name} carries {full_links[0].share:.0%} of its capacity"
    is_ttft = point.ttft_attainment <= point.tpot_attainment
    decoding = [use for use in uses if use.role is not Role.PREFILL]
    role = uses[0].role if is_ttft else decoding[0].role
    pool = [use for use in uses if use.role is role]
    busy = sum(use.busy for use in pool) / len(pool)
    memory = max(use.kv_share for use in decoding)
    limit = f"TTFT ({point.ttft_attainment:.0%} within)" if is_ttft else f"TPOT ({point.tpot_attainment:.0%} within)"
    if memory >= _FULL_MEMORY and (not is_ttft or role is Role.MIXED):
        return f"{limit}: KV memory of {decoding[0].role} instances is full ({memory:.0%} at its peak)"
    if is_ttft:
        cause = "prompts queue" if busy >= _BUSY else "bursts of prompts, with little time to spare,"
        return f"{limit}: {cause} at {role} instances, {busy:.0%} busy"
    batch = sum(use.mean_batch for use in decoding) / len(decoding)
    return f"{limit}: steps of {decoding[0].role} instances with {batch:.0f} sequences each on average"


def _capacity(uses: Sequence[InstanceUse]) -> str:
    """The objective holds up to the capacity that bounds the search: which instances are at it."""
    shares = {
        role: max(max(use.busy, use.kv_share) for use in uses if use.role is role)
        for role in {use.role for use in uses}
    }
    role = max(shares, key=lambda which: (shares[which], which))
    return f"capacity: {role} instances compute and hold no more ({shares[role]:.0%} in use)"
