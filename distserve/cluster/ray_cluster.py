"""The Ray cluster under a launch: an existing one that is joined, or a small local one of our own.

A local Ray is trimmed to what is used of it (placing, starting and watching a handful of actors) and keeps its files in
the session's directory. Its core processes die with the launcher by themselves; the session's reaper sees to the rest.
"""

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from distserve.cluster.seats import FoundNode, NodeGroup, match_nodes
from distserve.core.errors import ConfigError
from distserve.core.topology import ClusterSpec

_OBJECT_STORE_BYTES = 80 * 2**20
"""Close to the least that Ray takes: tokens and KV never go through it."""

_LOOPBACK = "127.0.0.1"
_GPU_TYPE = "accelerator_type:"
_NODE_POLL = 2.0
_ANSWER = 10.0
"""Seconds within which a cluster's head has to take a connection."""


@dataclass(frozen=True, slots=True)
class RayCluster:
    """A Ray cluster joined or started; ``host`` is the address that its nodes reach this one at, loopback if local."""

    host: str
    is_local: bool

    @property
    def largest_num_cpus(self) -> int:
        """CPUs of the node that has most."""
        return max((node.num_cpus for node in self.nodes()), default=0)

    def nodes(self) -> list[FoundNode]:
        """The nodes that are alive now."""
        found = []
        for node in ray.nodes():  # type: ignore[no-untyped-call]
            if node["Alive"]:
                resources = node["Resources"]
                types = {name.removeprefix(_GPU_TYPE) for name in resources if name.startswith(_GPU_TYPE)}
                found.append(
                    FoundNode(
                        node["NodeID"],
                        int(resources.get("CPU", 0)),
                        int(resources.get("GPU", 0)),
                        frozenset(types),
                        int(resources.get("memory", 0)),
                    )
                )
        return found

    def here(self) -> str:
        """The node that this process is on, by its Ray id."""
        return str(ray.get_runtime_context().get_node_id())

    def match(
        self, groups: Sequence[NodeGroup], planned: ClusterSpec, patience: float, show: Callable[[str], None]
    ) -> dict[int, FoundNode]:
        """The node for each node of a plan, waiting at most ``patience`` seconds for nodes to come.

        Raises:
            ConfigError: they have not; says what is missing.
        """
        end = time.monotonic() + patience
        while True:
            try:
                return match_nodes(groups, planned, self.nodes())
            except ConfigError as error:
                left = end - time.monotonic()
                if left <= 0:
                    raise
                show(f"waiting for nodes, {left:.0f} s at most: {error}")
                time.sleep(min(_NODE_POLL, left))


def this_node() -> FoundNode:
    """This machine, as a local cluster on it could use it."""
    gpus = Path("/proc/driver/nvidia/gpus")
    return FoundNode("", len(os.sched_getaffinity(0)), len(list(gpus.iterdir())) if gpus.is_dir() else 0)


def local_cluster(directory: str, num_cpus: int, num_gpus: int = 0) -> AbstractContextManager[RayCluster]:
    """Start a cluster of this machine alone, with ``num_cpus`` and ``num_gpus``, and its files in ``directory``.

    Must be entered on the main thread, which has to outlive the cluster: the kernel ties Ray's processes to the thread
    that started them.

    Raises:
        ConfigError: it does not start.
    """
    return _cluster(
        "start a local Ray cluster",
        address="local",
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        _node_ip_address=_LOOPBACK,
        _temp_dir=directory,
        # Ray's default is 15: whatever else the machine runs, the endpoint included, would starve the engines.
        _system_config={"worker_niceness": 0},
    )


def joined_cluster(address: str) -> AbstractContextManager[RayCluster]:
    """Join the cluster at ``address`` (``auto``: the one this machine is part of).

    Raises:
        ConfigError: there is nothing to join.
    """
    _check_reachable(address)
    return _cluster(f"join the Ray cluster at {address}", address=address, namespace="distserve")


def _check_reachable(address: str) -> None:
    """Raise ConfigError if ``address`` is a host and port where nothing answers: Ray would try for minutes."""
    host, colon, port = address.rpartition(":")
    if "://" in address or not colon or not port.isdigit():
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER):
            pass
    except OSError as error:
        raise ConfigError(f"cannot join the Ray cluster at {address}: {error.strerror or error}") from error


@contextmanager
def _cluster(attempt: str, **settings: Any) -> Iterator[RayCluster]:
    try:
        ray.init(log_to_driver=True, logging_level=logging.ERROR, **settings)
    except Exception as error:  # Ray raises nothing more specific where one of its processes does not start
        raise ConfigError(f"cannot {attempt}: {error}") from error
    is_local = settings["address"] == "local"
    try:
        host = _LOOPBACK if is_local else str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        yield RayCluster(host, is_local)
    finally:
        ray.shutdown()
