"""What the hybrid's benchmark serves, on which GPUs and within which limits.

The study's own lengths with Llama-3.1-8B on H100s, and the three applications that DistServe was measured with, their
lengths and limits as in deploy/examples, with OPT-13B on A100s: the largest of its models that one card holds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.goodput.map_grid import LLAMA_8B
from benchmarks.goodput.measured.runs import WORKLOADS
from distserve.bench.workload import WorkloadSpec
from distserve.core.config import SLO
from distserve.core.topology import ClusterSpec
from placement.config import Overrides, load_problem
from simulator.latency.shape import ModelShape

H100S = ClusterSpec("h100-sxm", 1, 8, intra_node_bandwidth=450e9, inter_node_bandwidth=50e9)
OBJECTIVES = {
    "tight TPOT": SLO(ttft=0.5, tpot=0.010),
    "balanced": SLO(ttft=0.2, tpot=0.020),
    "tight TTFT": SLO(ttft=0.1, tpot=0.050),
}
"""What the study's lengths are served within."""
PAPER = {"chatbot": "opt-13b-sharegpt", "code completion": "opt-66b-humaneval", "long documents": "opt-66b-longbench"}
"""DistServe's applications, and the example that has the lengths and limits of each."""
PUBLISHED = "the paper's"
"""The one objective of each of them."""
NAMES = (*WORKLOADS, *PAPER)
EXAMPLES = Path(__file__).parents[2] / "deploy" / "examples"


@dataclass(frozen=True, eq=False)
class Load:
    """Requests of a kind for ``model``, on equal GPUs, and the objectives they may have, by name.

    ``most`` requests/s are more than an instance can serve.
    """

    model: ModelShape
    cluster: ClusterSpec
    requests: WorkloadSpec
    objectives: Mapping[str, SLO]
    most: float


@cache
def find_load(name: str) -> Load:
    """One of ``NAMES``."""
    if name in WORKLOADS:
        return Load(LLAMA_8B.model, H100S, WORKLOADS[name].spec(num_requests=1, seed=0), OBJECTIVES, 300.0)
    example = load_problem(EXAMPLES / f"{PAPER[name]}.yaml", Overrides(num_workers=1))
    model = ModelShape.load(EXAMPLES / "models" / "opt-13b")
    return Load(model, example.cluster, example.workload, {PUBLISHED: example.slo}, 40.0)
