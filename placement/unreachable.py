"""Why no placement reaches an objective: which constraint, the best value there is, and what would help."""

from collections.abc import Sequence

from distserve.core.config import Role
from placement.fewest import Holding
from placement.plan import UnreachableError
from placement.race import Bounds
from placement.shapes import Refusal, Shape
from placement.tasks import Setting


def explain_unreachable(
    setting: Setting, bounds: Bounds, shapes: Sequence[Shape], refused: Sequence[Refusal], closest: Holding | None
) -> UnreachableError:
    """The first constraint that excludes every placement, in the order memory, TTFT, TPOT, rate."""
    problem = setting.problem
    slo, cluster = problem.slo, problem.cluster
    target = f"{slo.attainment:.0%}"
    if not shapes:
        memory = [refusal for refusal in refused if refusal.constraint == "memory"]
        if memory:
            return UnreachableError(
                "memory",
                f"{problem.model.name} fits no shape on {cluster.num_nodes} x {cluster.gpus_per_node} {cluster.gpu}; "
                f"the widest, {memory[-1].reason}",
                "GPUs with more memory, more of them, or a smaller model would help",
            )
        reason = refused[-1].reason if refused else "the cluster has no GPUs"
        return UnreachableError("shape", reason, "choose a cluster or a source of step times that knows such a shape")
    known = [(shape, bounds.of_shape(shape)) for shape in shapes]
    fits = max(known, key=lambda item: item[1].memory)
    if fits[1].memory < slo.attainment:
        return UnreachableError(
            "memory",
            f"only {fits[1].memory:.0%} of the requests fit the KV memory of {fits[0]}: {fits[0].kv.num_tokens} tokens",
            "shorter requests, GPUs with more memory, or more GPUs per instance would help",
        )
    prefill = min((item for item in known if item[0].role is not Role.DECODE), key=lambda item: item[1].ttft)
    if prefill[1].ttft > slo.ttft:
        return UnreachableError(
            "ttft",
            f"even a lone prompt takes {prefill[1].ttft:.3f} s at the {target} quantile of lengths, on {prefill[0]}, "
            f"the fastest shape",
            f"a TTFT of at least {prefill[1].ttft:.3f} s, shorter prompts or faster GPUs would help",
        )
    decode = min((item for item in known if item[0].role is not Role.PREFILL), key=lambda item: item[1].tpot)
    if decode[1].tpot > slo.tpot:
        return UnreachableError(
            "tpot",
            f"even a lone sequence takes {decode[1].tpot:.4f} s per token at the {target} quantile, on {decode[0]}, "
            "the fastest shape",
            f"a TPOT of at least {decode[1].tpot:.4f} s or GPUs with more memory bandwidth would help",
        )
    if closest is not None and problem.rate is not None:
        point = closest.measurement.point
        return UnreachableError(
            "rate",
            f"at {problem.rate:g} requests/s the closest placement ({closest.candidate}; {closest.candidate.num_gpus} "
            f"of {cluster.num_gpus} GPUs) serves {point.attainment.estimate:.1%} within the limits, not {target}",
            "more GPUs, a lower rate or looser limits would help",
        )
    if problem.rate is not None:
        least = min(
            -(-problem.rate // bound.capacity) * shape.num_gpus for shape, bound in known if shape.role is Role.PREFILL
        )
        return UnreachableError(
            "rate",
            f"{problem.rate:g} requests/s exceed what {cluster.num_gpus} GPUs can compute: prompts alone take "
            f"{least:.0f} GPUs",
            "more GPUs or a lower rate would help",
        )
    return UnreachableError(
        "both limits",
        f"TTFT {slo.ttft:g} s and TPOT {slo.tpot:g} s hold for {target} of requests at no rate",
        "looser limits or faster GPUs would help",
    )
