"""What parts of a cluster tell each other before any message can flow. Plain data, light to import."""

from dataclasses import dataclass
from pathlib import Path

from distserve.core.config import InstanceSpec

OWNER = "api-0"
"""Name of the API process, which owns the requests."""

CUDA = "distserve.cluster.gpu:cuda_hardware"
"""What opens a CUDA card, as ``module:function``: who passes it on need not import torch."""


@dataclass(frozen=True, slots=True)
class ClusterKey:
    """The CURVE key pair that all parts of one launch share (Z85 text); the secret half never leaves the cluster."""

    public: str
    secret: str


@dataclass(frozen=True, slots=True)
class Card:
    """Where a part is reached: messages at ``endpoint``, its KV memory (instances only) at ``kv_address``."""

    name: str
    endpoint: str
    kv_address: str = ""


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """What an instance computes with: model directory, ``dtype`` (float32 or bfloat16), threads of each rank.

    ``cores`` are the CPUs of its ranks, ``num_threads`` for each in order, if they are pinned.
    """

    model_dir: Path
    dtype: str
    num_threads: int
    cores: tuple[int, ...] = ()
    device: str = "cpu"
    """``cpu``, or ``cuda:N`` as the instance's process numbers its GPUs; a node's n-th rank has the n-th."""
    hardware: str = CUDA
    """The function that opens ``device`` in the instance's process, unless that is the CPU; see CUDA."""


@dataclass(frozen=True, slots=True)
class KvAccess:
    """How ranks reach each other's KV memory.

    ``transport`` is auto (shared memory within a host, else TCP), shm or tcp; between GPUs auto (mapped memory where a
    card reaches it, else NCCL, or TCP without it), nccl or tcp. A port is opened only if ``opens_port``: on
    ``interface``, a network interface or network of every node (None: the node's own address), where ranks of one
    instance on several nodes listen for each other as well.
    """

    transport: str = "auto"
    interface: str | None = None
    opens_port: bool = False


NEARBY = KvAccess()
"""Among processes of one host."""


@dataclass(frozen=True, slots=True)
class InstanceConfig:
    """Everything that ``ranks``, those of an instance on one node, need; empty: all of them.

    They take the CPUs from ``first_core`` on of those they may use, ``num_threads`` each, if all ``num_cores`` wanted
    by the instances of the node are there; else they share whatever there is. ``host`` is the address to listen on,
    None the node's own. ``log_dir`` is where the event log goes, if one is wanted.
    """

    spec: InstanceSpec
    plan: EnginePlan
    key: ClusterKey
    host: str | None
    first_core: int
    num_cores: int
    log_dir: Path | None = None
    kv_access: KvAccess = NEARBY
    ranks: tuple[int, ...] = ()

    @property
    def is_apart(self) -> bool:
        """Whether the instance has ranks on other nodes."""
        return 0 < len(self.ranks) < self.spec.parallel.num_ranks
