"""What the ranks of an instance find on one node: CPUs, the address they listen at, what their KV memory is made with.

Rank 0's node is the instance's (:mod:`distserve.cluster.instance`); on each further node a process of its own calls
:func:`host_ranks`. Knows nothing of Ray.
"""

import hashlib
import subprocess

from distserve.cluster.interface import address_on
from distserve.cluster.parts import InstanceConfig
from distserve.cluster.process import own_cores
from distserve.cluster.rank_memory import MemoryOptions
from distserve.engine.group.away import Muster, join
from distserve.engine.group.processes import NodeShare
from distserve.engine.sharding.meeting import LOOPBACK
from distserve.transfer.choose import TransportKind


def share_of(config: InstanceConfig) -> NodeShare:
    """What ``config.ranks`` find on this node; raises ConfigError if it lacks the network asked for."""
    ranks = config.ranks or tuple(range(config.spec.parallel.num_ranks))
    cores = own_cores(config.first_core, config.plan.num_threads * len(ranks), config.num_cores)
    host = _rank_address(config) if config.is_apart else LOOPBACK
    return NodeShare(ranks, host, cores, memory_options(config).encode())


def memory_options(config: InstanceConfig) -> MemoryOptions:
    """What the KV memory of a rank on this node is made with; raises ConfigError as :func:`share_of`."""
    access = config.kv_access
    host = _rank_address(config) if access.opens_port else None
    secret = hashlib.sha256(config.key.secret.encode()).digest()
    hardware = config.plan.hardware if config.plan.device != "cpu" else ""
    return MemoryOptions(secret, TransportKind(access.transport), host, hardware)


def open_muster(config: InstanceConfig) -> Muster:
    """Where rank 0 awaits the instance's ranks of other nodes; raises ConfigError as :func:`share_of`."""
    away = frozenset(range(config.spec.parallel.num_ranks)) - set(config.ranks)
    return Muster(_rank_address(config), _secret(config), away)


def host_ranks(config: InstanceConfig, address: str) -> "subprocess.Popen[bytes]":
    """Start the ranks ``config.ranks`` of an instance whose rank 0 is on another node, with its muster at ``address``.

    They end with the instance, or when what is returned is let go of.

    Raises:
        ConfigError: this node lacks the network asked for.
        InstanceError: rank 0 cannot be reached.
    """
    return join(address, _secret(config), share_of(config))


def _rank_address(config: InstanceConfig) -> str:
    """Where ranks of this node listen for those of others: on the network asked for, or at the node's own address."""
    interface = config.kv_access.interface
    return config.host or LOOPBACK if interface is None else address_on(interface)


def _secret(config: InstanceConfig) -> bytes:
    """What the ranks of this instance, and nobody else, know."""
    return hashlib.sha256(f"ranks of {config.spec.instance_id}: {config.key.secret}".encode()).digest()
