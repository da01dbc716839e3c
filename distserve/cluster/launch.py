"""From a checked configuration to a running cluster: Ray, placement, instances, router, supervision; and back.

Everything below the endpoint is started here, in parallel where it can be, and stopped in reverse order.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import ray
from ray.exceptions import RayError

from distserve.cluster.config import ServeConfig
from distserve.cluster.deployment import Blueprint, Deployment, cause_of
from distserve.cluster.describe import Description, ModelFacts
from distserve.cluster.network import Mailbox, create_key
from distserve.cluster.parts import OWNER, Card, ClusterKey, EnginePlan
from distserve.cluster.ray_cluster import ray_cluster
from distserve.cluster.session import Session
from distserve.cluster.sizing import check_processes, free_memory, size_kv, threads_per_instance
from distserve.cluster.supervise import Supervisor
from distserve.core.config import SchedulerConfig
from distserve.core.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Launched:
    """What runs beneath the endpoint."""

    deployment: Deployment
    mailbox: Mailbox


@contextmanager
def launch(config: ServeConfig, show: Callable[[str], None]) -> Iterator[Launched]:
    """Start every part but the endpoint; stop them again at the end."""
    num_threads = threads_per_instance(config.engine.threads, config.num_instances)
    num_cores = num_threads * config.num_instances
    num_cpus = len(os.sched_getaffinity(0))
    if config.ray_address is None and num_cores > num_cpus:
        logger.warning("%d threads of %d instances share %d CPUs", num_cores, config.num_instances, num_cpus)
    if config.ray_address is None:
        # Ray starts a process per CPU promised to it: a number beyond reason must not get that far.
        check_processes(config.num_instances, free_memory())
    with ExitStack() as stack:
        description = stack.enter_context(Description(config.model_dir, config.engine.dtype))
        if config.ray_address is None:
            show("starting a local Ray cluster")
            directory = str(stack.enter_context(Session()).directory)
        else:
            show(f"joining the Ray cluster at {config.ray_address}")
            directory = ""
        cluster = stack.enter_context(ray_cluster(config.ray_address, directory, num_cores + 1))
        show("examining the model")
        facts = description.result()
        key = create_key()
        mailbox = Mailbox(OWNER, key, cluster.host)
        stack.callback(mailbox.close)
        blueprint = _blueprint(config, facts, num_threads, key)
        deployment = Deployment(
            cluster,
            blueprint,
            Card(OWNER, mailbox.endpoint),
            lambda cards: mailbox.meet({card.name: card.endpoint for card in cards}),
        )
        stack.callback(deployment.close)
        _start_parts(deployment, show)
        supervisor = Supervisor(deployment)
        supervisor.start()
        stack.callback(supervisor.close)
        yield Launched(deployment, mailbox)


def _start_parts(deployment: Deployment, show: Callable[[str], None]) -> None:
    """Start router and instances in parallel and introduce them to each other."""
    show("waiting for CPUs")
    deployment.reserve()
    router = deployment.start_router()
    loading = dict(deployment.start_instance(slot)[::-1] for slot in range(len(deployment.blueprint.roles)))
    loaded = []
    while loading:
        names = ", ".join(member.spec.instance_id for member in loading.values())
        show(f"loading the model on {names}")
        done, _ = ray.wait(list(loading), timeout=1.0)
        for call in done:
            member = loading.pop(call)
            try:
                member.card = ray.get(call)
            except RayError as error:
                raise cause_of(error, member.spec.instance_id) from error
            loaded.append(member)
    show("introducing the instances to each other")
    deployment.adopt_router(ray.get(router))
    deployment.adopt_instances(loaded)


def _blueprint(config: ServeConfig, facts: ModelFacts, num_threads: int, key: ClusterKey) -> Blueprint:
    engine = config.engine
    max_model_len = min(engine.max_model_len or facts.max_model_len, facts.max_model_len)
    if engine.max_model_len is not None and engine.max_model_len > facts.max_model_len:
        raise ConfigError(
            f"--max-model-len {engine.max_model_len} is more than the model can take: at most {facts.max_model_len}"
        )
    kv = size_kv(
        engine.kv,
        weight_bytes=facts.weight_bytes,
        token_bytes=facts.token_bytes,
        max_model_len=max_model_len,
        num_instances=config.num_instances,
        free=free_memory(),
    )
    if kv.num_tokens < max_model_len:
        logger.warning("KV memory holds %d tokens, requests longer than that are refused", kv.num_tokens)
    return Blueprint(
        roles=tuple(role for role, count in config.pools for _ in range(count)),
        plan=EnginePlan(config.model_dir, engine.dtype, num_threads),
        kv=kv,
        scheduler=SchedulerConfig(
            max_batch_tokens=engine.max_batch_tokens,
            max_batch_size=engine.max_batch_size,
            max_model_len=max_model_len,
        ),
        key=key,
        log_dir=config.event_log,
    )
