"""What the planner is asked: a model, an objective, a workload, a cluster, and a source of step times.

Facts only; where they were read from (YAML, a trace file, a Hugging Face directory) is :mod:`placement.config`'s
business.
"""

from dataclasses import dataclass, field, replace

from distserve.bench.workload import WorkloadSpec
from distserve.cluster.seats import CPU
from distserve.core.config import SLO, KvConfig, ParallelConfig, PrefillPolicy, Role
from distserve.core.topology import ClusterSpec
from simulator.latency.gpus import GpuSpec, find_gpu
from simulator.latency.interface import LatencyModel
from simulator.latency.memory import kv_config, kv_of_bytes
from simulator.latency.shape import ModelShape
from simulator.model import Delays


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Limits of every instance, beside what its shape and memory decide.

    ``prefill_batch_tokens`` is DistServe's ``L_m`` of prefill instances and ``mixed_batch_tokens`` the budget of mixed
    ones; None lets the planner derive it per shape from the step times. ``max_model_len`` refuses longer requests, as
    the deployment will. ``memory_bytes`` is a GPU's memory if it differs from the table's. ``kv_tokens`` or, failing
    that, ``kv_memory`` (bytes over all ranks) fixes every instance's KV memory instead of deriving it, which yields no
    more than ``kv_most`` bytes.
    """

    block_size: int = 16
    memory_utilisation: float = 0.9
    max_batch_size: int = 256
    max_model_len: int = 1 << 20
    prefill_batch_tokens: int | None = None
    mixed_batch_tokens: int | None = None
    memory_bytes: int | None = None
    kv_tokens: int | None = None
    kv_memory: int | None = None
    kv_most: int | None = None


@dataclass(frozen=True, slots=True)
class SearchLimits:
    """How hard the planner looks.

    ``policies`` of mixed instances are rivals, and with ``hybrid`` so are SplitFuse's beside prefill instances.
    ``max_pp`` and ``max_instances`` (per phase) bound the space, ``num_finalists`` placements are measured with
    intervals, ``tolerance`` is how wide, as a share of itself, a finalist's goodput may stay bracketed.
    ``num_requests`` is the length of the shortest runs, ``max_requests`` of all runs at one rate together, unless a
    pair of runs is longer. ``seed`` decides every random number; ``num_workers`` None takes every core, and the answer
    does not depend on it.
    """

    policies: tuple[PrefillPolicy, ...] = (PrefillPolicy.SPLITFUSE,)
    hybrid: bool = True
    max_pp: int = 8
    max_instances: int = 64
    num_finalists: int = 2
    tolerance: float = 0.04
    num_requests: int = 300
    max_requests: int = 4000
    seed: int = 0
    num_workers: int | None = None


@dataclass(frozen=True)
class Problem:
    """``rate`` requests/s must be served, with the fewest GPUs; None: find the best goodput per GPU.

    ``workload`` is made anew at every rate the planner tries; its arrivals must be open-loop. The workload's own
    ``num_requests``, ``duration`` and ``seed`` do not count, the planner chooses run lengths and seeds.
    """

    model: ModelShape
    slo: SLO
    workload: WorkloadSpec
    rate: float | None
    cluster: ClusterSpec
    latency: LatencyModel
    limits: EngineLimits = EngineLimits()
    search: SearchLimits = SearchLimits()
    delays: Delays = field(default_factory=Delays)

    @property
    def gpu(self) -> GpuSpec:
        """The cluster's GPU. Raises ConfigError for an unknown name."""
        return find_gpu(self.cluster.gpu)

    def kv(self, parallel: ParallelConfig, max_batch_tokens: int) -> KvConfig | None:
        """KV memory of an instance of this shape; None if the weights leave none, or less than was asked for.

        Raises ConfigError if the model cannot be split so, or the memory asked for holds no block.
        """
        limits, gpu = self.limits, self.gpu
        if limits.memory_bytes is not None:
            gpu = replace(gpu, memory_bytes=limits.memory_bytes)
        room = kv_config(
            self.model,
            gpu,
            parallel,
            block_size=limits.block_size,
            memory_utilisation=limits.memory_utilisation,
            max_batch_tokens=max_batch_tokens,
        )
        asked = self._kv_asked(parallel)
        if asked is None:
            if room is None or limits.kv_most is None:
                return room
            most = kv_of_bytes(self.model, parallel, limits.kv_most, limits.block_size)
            return min(room, most, key=lambda kv: kv.num_blocks)
        # The memory of a slot of CPUs is anybody's guess: who asks for some there is taken to know.
        is_known = gpu.name != CPU or limits.memory_bytes is not None
        return None if is_known and (room is None or room.num_blocks < asked.num_blocks) else asked

    def _kv_asked(self, parallel: ParallelConfig) -> KvConfig | None:
        limits = self.limits
        if limits.kv_tokens is not None:
            return KvConfig.holding(limits.kv_tokens, limits.block_size)
        if limits.kv_memory is not None:
            return kv_of_bytes(self.model, parallel, limits.kv_memory, limits.block_size)
        return None


@dataclass(frozen=True, slots=True)
class Pool:
    """``count`` equal instances of one role."""

    role: Role
    parallel: ParallelConfig
    count: int

    @property
    def num_gpus(self) -> int:
        """GPUs of all of them."""
        return self.count * self.parallel.num_ranks

    def __str__(self) -> str:
        return f"{self.count} {self.role} TP{self.parallel.tp} PP{self.parallel.pp}"
