"""The ways to serve on this machine's cores that are held against each other, ours and vLLM's.

Each may be given another token budget for a step in every cell: what is compared is the best that each can do there.
The hybrid is told an objective to divide prompts for: the balanced one, and for tight TPOT once more that.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from benchmarks.common.servers import Server
from benchmarks.common.systems import Bench, Deployment, all_cores
from benchmarks.goodput.measured.runs import OBJECTIVES
from distserve.core.config import Role

KV_TOKENS = 65536


@dataclass(frozen=True)
class Contender:
    """One way to serve. ``budgets``: tokens in a step that are tried, the first one for a whole curve.

    ``deployment`` is None for vLLM's; ``cores`` is what vLLM is bound to (empty: disaggregated, a core each).
    """

    name: str
    title: str
    budgets: tuple[int, ...]
    deployment: Deployment | None = None
    cores: str = ""

    def serving(self, bench: Bench, budget: int) -> AbstractContextManager[Server]:
        """The server, started with ``budget`` tokens a step."""
        name = f"{self.name}-{budget}"
        if self.deployment is not None:
            return bench.ours(replace(self.deployment, max_batch_tokens=budget), name)
        return bench.vllm_on(self.cores, name, budget) if self.cores else bench.vllm_disaggregated(budget)

    @property
    def pools(self) -> dict[Role, int]:
        """Ours: instances by role."""
        assert self.deployment is not None, "vLLM has no instances of ours"
        counts = {
            Role.PREFILL: self.deployment.prefill,
            Role.DECODE: self.deployment.decode,
            Role.MIXED: self.deployment.mixed,
        }
        return {role: count for role, count in counts.items() if count}


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender(
            "disaggregated",
            "1 prefill + 1 decode",
            (512,),
            Deployment(prefill=1, decode=1, threads=1, kv_tokens=KV_TOKENS),
        ),
        Contender("mixed-x1", "1 mixed on 2 cores", (512, 128), Deployment(mixed=1, threads=2, kv_tokens=KV_TOKENS)),
        Contender("mixed-x2", "2 mixed, a core each", (512, 128), Deployment(mixed=2, threads=1, kv_tokens=KV_TOKENS)),
        Contender(
            "hybrid",
            "1 prefill + 1 mixed",
            (512, 128),
            Deployment(prefill=1, mixed=1, threads=1, kv_tokens=KV_TOKENS, slo=OBJECTIVES["balanced"]),
        ),
        Contender(
            "hybrid-tight",
            "1 prefill + 1 mixed, told the tight TPOT",
            (512, 128),
            Deployment(prefill=1, mixed=1, threads=1, kv_tokens=KV_TOKENS, slo=OBJECTIVES["tight TPOT"]),
        ),
        Contender("vllm", "vLLM on 2 cores", (2048, 512, 128), cores=all_cores()),
        Contender("vllm-disaggregated", "vLLM's disaggregated prefill, 1 + 1", (2048,)),
    )
}
OURS = tuple(name for name, contender in CONTENDERS.items() if contender.deployment is not None)
