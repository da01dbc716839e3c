"""Plans made by hand: two prefill and one decode instance of two GPUs each, and a colocated rival."""

from dataclasses import replace

import numpy as np

from distserve.bench.arrivals import Gamma
from distserve.bench.lengths import Lognormal
from distserve.bench.workload import WorkloadSpec
from distserve.core.config import SLO, InstanceSpec, KvConfig, ParallelConfig, PrefillPolicy, Role
from distserve.core.topology import ClusterSpec, Gpu, PlacedInstance, Placement
from placement.outlook import Change, Curve, KvFlow, Outlook, Phases, Sample, Variant, rivals
from placement.plan import (
    Evaluation,
    InstanceUse,
    Interval,
    LinkUse,
    Percentiles,
    Plan,
    RatePoint,
    SearchStats,
)
from placement.problem import Problem
from simulator.latency.analytic import AnalyticModel
from simulator.latency.shape import ModelShape

CLUSTER = ClusterSpec("a100-80g-sxm", 4, 8, 300e9, 3.125e9)
SHAPE = ModelShape(
    name="toy-13b",
    num_layers=40,
    hidden=5120,
    num_heads=40,
    num_kv_heads=40,
    head_dim=128,
    intermediate=20480,
    vocab=50272,
    gated_mlp=False,
)
TARGET = SLO(0.25, 0.1, 0.9)


def problem(rate: float | None = 12.0) -> Problem:
    spec = WorkloadSpec(Gamma(1.0), Lognormal(700, 0.8, 2000), Lognormal(200, 0.7, 1000))
    return Problem(SHAPE, TARGET, spec, rate, CLUSTER, AnalyticModel(SHAPE, CLUSTER))


def instance(name: str, role: Role, tp: int, gpus: list[tuple[int, int]], pp: int = 1) -> PlacedInstance:
    spec = InstanceSpec(name, role, KvConfig(4000, 16), parallel=ParallelConfig(tp, pp))
    return PlacedInstance(spec, tuple(Gpu(node, index) for node, index in gpus))


def point(rate: float, both: float, ttft: float, tpot: float, instability: str = "") -> RatePoint:
    return RatePoint(
        rate,
        Interval(both, max(both - 0.012, 0), min(both + 0.012, 1)),
        ttft,
        tpot,
        Percentiles(0.11, 0.09, 0.2, 0.41),
        Percentiles(0.05, 0.048, 0.06, 0.09),
        3000,
        5,
        instability,
    )


def evaluation(label: str, placement: Placement, goodput: float, at: float) -> Evaluation:
    rates = goodput * np.array([0.4, 0.7, 0.9, 1.0, 1.1, 1.3, 1.6])
    shares = [(0.995, 0.998, 0.997), (0.98, 0.985, 0.995), (0.94, 0.95, 0.985), (0.905, 0.915, 0.98)]
    shares += [(0.8, 0.815, 0.96), (0.5, 0.53, 0.9), (0.1, 0.12, 0.7)]
    curve = tuple(
        point(
            float(rate),
            *share,
            "the backlog grows: 12 requests in the first third, 80 in the last" * int(rate > 1.2 * goodput),
        )
        for rate, share in zip(rates, shares, strict=True)
    )
    return Evaluation(
        label=label,
        placement=placement,
        policy=PrefillPolicy.SPLITFUSE,
        goodput=Interval(goodput, 0.98 * goodput, 1.02 * goodput),
        point=replace(point(at, 0.931, 0.94, 0.985)),
        curve=curve,
        instances=tuple(
            InstanceUse(
                placed.spec.instance_id,
                placed.spec.role,
                placed.spec.parallel,
                placed.gpus,
                0.71,
                8.4,
                2500,
                4000,
                52_428_800_000,
                3,
            )
            for placed in placement.instances
        ),
        links=(LinkUse("node 0 GPU 0 out", 300e9, 4.1e9, 0.02), LinkUse("node 0 NIC 0 out", 3.125e9, 1.9e9, 0.7)),
        binding="TTFT: above 12.5 requests/s prompts wait for the prefill instances, which are busy 93% of the time",
    )


def disaggregated() -> Placement:
    return Placement(
        CLUSTER,
        (
            instance("prefill-0", Role.PREFILL, 2, [(0, 0), (0, 1)]),
            instance("prefill-1", Role.PREFILL, 2, [(0, 2), (0, 3)]),
            instance("decode-0", Role.DECODE, 1, [(1, 0), (1, 1)], pp=2),
        ),
    )


def colocated() -> Placement:
    return Placement(
        CLUSTER, tuple(instance(f"mixed-{i}", Role.MIXED, 2, [(0, 2 * i), (0, 2 * i + 1)]) for i in range(4))
    )


def plan(rate: float | None = 12.0) -> Plan:
    chosen = evaluation("2 prefill TP2 + 1 decode TP1 PP2", disaggregated(), 12.5, rate or 12.5)
    rival = evaluation("4 mixed TP2", colocated(), 12.1, rate or 12.1)
    return Plan(
        problem=problem(rate),
        chosen=chosen,
        runner_up=rival,
        finalists=(chosen, rival),
        disaggregated=chosen,
        colocated=rival,
        hybrid=None,
        paper=None,
        stats=SearchStats(412, 300, 112, 240_000, 21.3),
        notes=("the trace's requests are used from the start again when it runs out",),
    )


def outlook() -> Outlook:
    rng = np.random.default_rng(0)
    prefill = rng.lognormal(np.log(0.12), 0.5, 2000)
    decode = rng.lognormal(np.log(0.06), 0.3, 2000)
    prefill[:20] = decode[:20] = np.nan
    return Outlook(
        variants=(
            Variant(Change.LOAD, "rate +20%", 6, point(14.4, 0.71, 0.72, 0.93, "the backlog grows"), None),
            Variant(Change.LOAD, "rate -20%", 6, point(9.6, 0.97, 0.975, 0.99), None),
            Variant(Change.LENGTHS, "prompts +20%", 6, point(12, 0.82, 0.83, 0.98), None),
            Variant(Change.LOSS, "one prefill lost", 4, point(12, 0.02, 0.03, 0.99, "the backlog grows"), 6.1),
            Variant(Change.LOSS, "one decode lost", 4, None, None, "no decode instance is left"),
            Variant(Change.SIZE, "one prefill more", 8, point(12, 0.985, 0.99, 0.985), 14.9),
        ),
        above=(point(14.4, 0.71, 0.72, 0.93), point(18.7, 0.2, 0.22, 0.9, "the backlog grows")),
        breaks="TTFT (72% within): prompts queue at prefill instances, 93% busy",
        goodput_tolerance=0.05,
        phases=(
            Phases(12.0, 0.03, 0.08, 0.02, 0.001, 9.1, 0.06, 0.015),
            Phases(13.8, 0.21, 0.08, 0.02, 0.001, 9.6, 0.31, 0.05),
        ),
        samples=(
            Sample("chosen: 2 prefill TP2 + 1 decode TP1 PP2", 12.0, prefill, decode),
            Sample("best colocated: 4 mixed TP2", 12.0, prefill * 1.3, decode * 1.4),
        ),
        flows=(KvFlow(0, 2, 3.1e9), KvFlow(1, 2, 2.9e9)),
        curves=tuple(Curve(name, found, found.curve) for name, found in rivals(plan())),
    )
