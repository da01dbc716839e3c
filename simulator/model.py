"""What is simulated: instances with the times of their steps, and the network between them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from distserve.core.config import InstanceSpec
from distserve.core.latency import StepTime
from distserve.core.router import RouterConfig
from distserve.core.topology import ClusterSpec, Gpu


@dataclass(frozen=True, slots=True)
class Delays:
    """Seconds: ``message`` from any part to any other, ``loss`` from a death to the router's knowing of it.

    ``pairs`` has delays of their own for messages from one part to another: in order between two parts, as always, but
    they may overtake those of other pairs. ``pull_latency`` is what a KV pull costs beside its bytes.

    Without a network a pull also takes ``seconds_per_block`` for each block, whatever else is under way.
    """

    message: float = 0.0005
    pairs: Mapping[tuple[str, str], float] = field(default_factory=dict)
    loss: float = 1.0
    pull_latency: float = 0.0005
    seconds_per_block: float = 0.0001


@dataclass(frozen=True, slots=True)
class InstanceModel:
    """One instance: its specification, how long its steps take, and the GPUs its ranks are on, in rank order.

    Shard ``t`` of stage ``s`` is on ``gpus[s * tp + t]``.
    """

    spec: InstanceSpec
    step_time: StepTime
    gpus: tuple[Gpu, ...] = ()


@dataclass(frozen=True, slots=True)
class KvGeometry:
    """What decides the bytes of a migration: ``token_bytes`` is one token's keys and values of one head of one layer.

    ``num_layers`` layers of ``num_kv_heads`` heads.
    """

    num_layers: int
    num_kv_heads: int
    token_bytes: int

    @property
    def bytes_per_token(self) -> int:
        """KV bytes of one token over all layers and heads."""
        return self.num_layers * self.num_kv_heads * self.token_bytes


@dataclass(frozen=True, slots=True)
class HostModel:
    """Cores that instances on CPUs share with what surrounds them, see :mod:`simulator.host`.

    The core seconds are spent outside the engines, by client, API, router and the instances' other threads; those of a
    pull are on the core of the decode instance. ``idle_cores`` are busy without any request. An engine's step after a
    sleep takes ``waking`` longer.
    """

    num_cores: float
    cpu_per_request: float = 0.0
    cpu_per_prompt_token: float = 0.0
    cpu_per_step: float = 0.0
    cpu_per_token: float = 0.0
    cpu_per_pull: float = 0.0
    cpu_per_pulled_block: float = 0.0
    idle_cores: float = 0.0
    waking: float = 0.0


@dataclass(frozen=True, slots=True)
class ClusterModel:
    """A deployment as the simulator runs it.

    ``cluster`` None: pulls see no network (see :class:`Delays`). ``host`` None: instances share no processors.
    """

    instances: tuple[InstanceModel, ...]
    cluster: ClusterSpec | None = None
    kv: KvGeometry | None = None
    delays: Delays = Delays()
    router: RouterConfig = field(default_factory=RouterConfig)
    host: HostModel | None = None
