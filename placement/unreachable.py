"""Why no placement reaches an objective: which constraint, the best value there is, and what would help."""

from collections.abc import Iterator, Sequence

from distserve.core.config import Role
from distserve.core.topology import Placement
from placement.bounds import ShapeBound
from placement.candidates import Candidate
from placement.fewest import Holding
from placement.plan import UnreachableError
from placement.race import Bounds
from placement.shapes import Refusal, Shape
from placement.tasks import JointPoint, Setting
from placement.words import seconds

_NEARLY_IDLE = 0.02
"""Of its capacity: the rate at which a placement shows what it does for requests that hardly ever meet."""


def explain_unreachable(
    setting: Setting, bounds: Bounds, shapes: Sequence[Shape], refused: Sequence[Refusal], closest: Holding | None
) -> UnreachableError:
    """The first constraint that excludes every placement, in the order shapes, memory, TTFT, TPOT, rate."""
    problem = setting.problem
    slo, cluster = problem.slo, problem.cluster
    target = f"{slo.attainment:.0%}"
    for other, words in ((Role.DECODE, "computes prompts"), (Role.PREFILL, "decodes")):
        if all(shape.role is other for shape in shapes):
            missing = f" that {words}" if shapes else ""
            return _without_shape(setting, [refusal for refusal in refused if refusal.role is not other], missing)
    known = [(shape, bounds.of_shape(shape)) for shape in shapes]
    computing = [item for item in known if item[0].role is not Role.DECODE]
    decoding = [item for item in known if item[0].role is not Role.PREFILL]
    roomiest = (max(phase, key=lambda item: item[1].memory) for phase in (computing, decoding))
    fits = min(roomiest, key=lambda item: item[1].memory)
    if fits[1].memory < slo.attainment:
        return UnreachableError(
            "memory",
            f"only {fits[1].memory:.0%} of the requests fit the KV memory of {fits[0]}: {fits[0].kv.num_tokens} tokens",
            "shorter requests, GPUs with more memory, or more GPUs per instance would help",
        )
    prefill = min(computing, key=lambda item: item[1].ttft)
    if prefill[1].ttft > slo.ttft:
        return UnreachableError(
            "ttft",
            f"even a lone prompt takes {prefill[1].ttft:.3f} s at the {target} quantile of lengths, on {prefill[0]}, "
            f"the fastest shape",
            f"a TTFT of at least {prefill[1].ttft:.3f} s, shorter prompts or faster GPUs would help",
        )
    decode = min(decoding, key=lambda item: item[1].tpot)
    if decode[1].tpot > slo.tpot:
        return UnreachableError(
            "tpot",
            f"even a lone sequence takes {decode[1].tpot:.4f} s per token at the {target} quantile, on {decode[0]}, "
            "the fastest shape",
            f"a TPOT of at least {decode[1].tpot:.4f} s or GPUs with more memory bandwidth would help",
        )
    if closest is not None and problem.rate is not None:
        point = closest.measurement.point
        surely = "surely " if point.attainment.estimate >= problem.slo.attainment else ""
        return UnreachableError(
            "rate",
            f"at {problem.rate:g} requests/s the closest placement ({closest.candidate}; {closest.candidate.num_gpus} "
            f"of {cluster.num_gpus} GPUs) serves {point.attainment.estimate:.1%} within the limits, not {surely}"
            f"{target}",
            "more GPUs, a lower rate or looser limits would help",
        )
    if problem.rate is not None:
        return UnreachableError(
            "rate",
            f"{problem.rate:g} requests/s exceed what {cluster.num_gpus} GPUs can compute, about "
            f"{_most(setting, bounds, shapes):.3g}{_apart(problem.rate, known)}",
            "more GPUs or a lower rate would help",
        )
    return UnreachableError(
        "both limits",
        _nearly_idle(setting, bounds, shapes),
        "looser limits, shorter requests or faster GPUs would help",
    )


def _without_shape(setting: Setting, refused: Sequence[Refusal], missing: str) -> UnreachableError:
    """Why there is no instance at all, or none of the kind that ``missing`` says, by what was ``refused`` of it."""
    model, cluster = setting.problem.model, setting.problem.cluster
    reasons = {kind: [each.reason for each in refused if each.constraint == kind] for kind in ("batch", "memory")}
    if reasons["batch"]:
        # They fit memory: nothing but the limits keeps them out.
        return UnreachableError("batch", reasons["batch"][0], "other limits of the section engine would help")
    if reasons["memory"]:
        return UnreachableError(
            "memory",
            f"{model.name} fits no shape{missing} on {cluster.num_nodes} x {cluster.gpus_per_node} {cluster.gpu}; "
            f"the widest, {reasons['memory'][-1]}",
            "GPUs with more memory, more of them, or a smaller model would help",
        )
    reason = refused[-1].reason if refused else "the cluster has no GPUs"
    return UnreachableError("shape", reason, "choose a cluster or a source of step times that knows such a shape")


def _apart(rate: float, known: Sequence[tuple[Shape, ShapeBound]]) -> str:
    """What each phase alone takes at least at ``rate``; empty where there are no instances for both apart."""
    gpus = [
        [-(-rate // bound.capacity) * shape.num_gpus for shape, bound in known if shape.role is role]
        for role in (Role.PREFILL, Role.DECODE)
    ]
    if not all(gpus):
        return ""
    prompts, decodes = map(min, gpus)
    return f": prompts alone take {prompts:.0f} GPUs, decoding {decodes:.0f}"


def _most(setting: Setting, bounds: Bounds, shapes: Sequence[Shape]) -> float:
    """Requests/s that the cluster's GPUs cannot exceed: all of them mixed, or divided between the phases as is best."""

    def per_gpu(role: Role) -> float:
        return max((bounds.of_shape(s).capacity / s.num_gpus for s in shapes if s.role is role), default=0.0)

    prefill, decode, mixed = (per_gpu(role) for role in (Role.PREFILL, Role.DECODE, Role.MIXED))
    apart = 1 / (1 / prefill + 1 / decode) if prefill and decode else 0.0
    return setting.problem.cluster.num_gpus * max(apart, mixed)


def _nearly_idle(setting: Setting, bounds: Bounds, shapes: Sequence[Shape]) -> str:
    """What the fastest placements attain when requests hardly ever meet: the best that any rate allows."""
    slo = setting.problem.slo
    tried = []
    for candidate, placement in _fastest(setting, bounds, shapes):
        rate = _NEARLY_IDLE * min(bounds.of_shape(shape).capacity for shape, _ in candidate.pools)
        tried.append((JointPoint(placement, rate)(setting).point, candidate))
    limits = f"TTFT {slo.ttft:g} s and TPOT {slo.tpot:g} s hold for {slo.attainment:.0%} of requests at"
    if not tried:
        return f"{limits} no rate"
    point, candidate = max(tried, key=lambda item: item[0].attainment.estimate)
    rates = "rates next to none alone: at" if point.holds(slo.attainment) else "no rate: even at"
    return (
        f"{limits} {rates} {point.rate:.2g} requests/s {candidate}, the best, serves {point.attainment.estimate:.1%} "
        f"within both (TTFT {point.ttft_attainment:.1%}, TPOT {point.tpot_attainment:.1%}; at their 90% quantiles "
        f"{seconds(point.ttft.p90)} and {seconds(point.tpot.p90)})"
    )


def _fastest(setting: Setting, bounds: Bounds, shapes: Sequence[Shape]) -> Iterator[tuple[Candidate, Placement]]:
    """A mixed instance and a pair that has room, each of the shapes that are best for lone requests."""

    def lone(shape: Shape) -> tuple[float, float, int]:
        bound = bounds.of_shape(shape)
        return -bound.attainment, bound.ttft + bound.tpot, shape.num_gpus

    ranked = sorted(shapes, key=lone)
    by_role = {role: [shape for shape in ranked if shape.role is role] for role in Role}
    alone = (Candidate(((shape, 1),)) for shape in by_role[Role.MIXED])
    apart = (Candidate(((p, 1), (d, 1))) for p in by_role[Role.PREFILL] for d in by_role[Role.DECODE])
    for candidates in (alone, apart):
        for candidate in candidates:
            placement = candidate.placement(setting.problem)
            if placement is not None:
                yield candidate, placement
                break
