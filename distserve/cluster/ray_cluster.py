"""The Ray cluster under a launch: an existing one that is joined, or a small local one of our own.

A local Ray is trimmed to what is used of it (placing, starting and watching a handful of actors) and keeps its files in
the session's directory. Its core processes die with the launcher by themselves; the session's reaper sees to the rest.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray

from distserve.core.errors import ConfigError

_OBJECT_STORE_BYTES = 80 * 2**20
"""Close to the least that Ray takes: tokens and KV never go through it."""


@dataclass(frozen=True, slots=True)
class RayCluster:
    """A Ray cluster joined or started; ``host`` is the address that its nodes reach this one at, loopback if local."""

    host: str
    is_local: bool
    num_cpus: float


@contextmanager
def ray_cluster(address: str | None, directory: str, num_cpus: int) -> Iterator[RayCluster]:
    """Join the cluster at ``address``, or start a local one with ``num_cpus`` and its files in ``directory``.

    Must be entered on the main thread, which has to outlive the cluster: the kernel ties Ray's processes to the thread
    that started them.

    Raises:
        ConfigError: nothing to join at ``address``, or the local cluster does not start.
    """
    try:
        if address is not None:
            ray.init(address=address, log_to_driver=True, logging_level=logging.ERROR, namespace="distserve")
        else:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                num_gpus=0,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                log_to_driver=True,
                logging_level=logging.ERROR,
                _node_ip_address="127.0.0.1",
                _temp_dir=directory,
                # Ray's default is 15: whatever else the machine runs, the endpoint included, would starve the engines.
                _system_config={"worker_niceness": 0},
            )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        what = f"join the Ray cluster at {address}" if address else "start a local Ray cluster"
        raise ConfigError(f"cannot {what}: {error}") from error
    try:
        host = "127.0.0.1" if address is None else str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
        yield RayCluster(host, address is None, float(resources.get("CPU", 0.0)))
    finally:
        ray.shutdown()
