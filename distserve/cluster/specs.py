"""From the instances wanted, the limits asked for and the model's facts to specifications; says what cannot be."""

import logging
from collections import Counter
from collections.abc import Sequence

from distserve.cluster.config import EngineSettings
from distserve.cluster.describe import ModelFacts
from distserve.cluster.seats import WantedInstance, group_by_node
from distserve.cluster.sizing import KvRequest, size_kv
from distserve.core.budget import check_budget
from distserve.core.config import InstanceSpec, PrefillPolicy, Role, SchedulerConfig
from distserve.core.errors import ConfigError
from distserve.core.shards import check_shards

logger = logging.getLogger(__name__)


def build_specs(
    instances: Sequence[WantedInstance], engine: EngineSettings, facts: ModelFacts, *, policy: PrefillPolicy, free: int
) -> tuple[InstanceSpec, ...]:
    """Specifications of ``instances``, named by role and number, on hosts with ``free`` bytes of memory each.

    Raises:
        ConfigError: limits exceed the model's or contradict each other, or memory does not suffice.
    """
    max_model_len = min(engine.max_model_len or facts.max_model_len, facts.max_model_len)
    if engine.max_model_len is not None and engine.max_model_len > facts.max_model_len:
        raise ConfigError(
            f"max_model_len {engine.max_model_len} is more than the model can take: at most {facts.max_model_len}"
        )
    fullest = max(group_by_node(instances), key=lambda group: len(group.seats))
    specs: list[InstanceSpec] = []
    numbers: Counter[Role] = Counter()
    for instance in instances:
        check_shards(instance.parallel, facts.num_layers, facts.num_kv_heads)
        planned = instance.limits
        asked = engine.kv if planned.kv_tokens is None else KvRequest(planned.kv_tokens, None, engine.kv.block_size)
        kv = size_kv(
            asked,
            weight_bytes=facts.weight_bytes,
            # Where there are more shards than KV heads, several have the same one.
            token_bytes=facts.token_bytes * max(1, instance.parallel.tp // facts.num_kv_heads),
            max_model_len=max_model_len,
            num_instances=len({slot for slot, _ in fullest.seats}),
            num_ranks=len(fullest.seats),
            free=free,
        )
        scheduler = SchedulerConfig(
            max_batch_tokens=planned.max_batch_tokens or engine.max_batch_tokens,
            max_batch_size=planned.max_batch_size or engine.max_batch_size,
            max_in_flight=instance.parallel.pp,
            max_model_len=max_model_len,
            prefix_caching=engine.prefix_caching,
            policy=policy,
        )
        name = f"{instance.role}-{numbers[instance.role]}"
        numbers[instance.role] += 1
        spec = InstanceSpec(name, instance.role, kv, scheduler, instance.parallel)
        check_budget(spec)
        specs.append(spec)
    least = min(spec.kv.num_tokens for spec in specs)
    if least < max_model_len:
        logger.warning("KV memory holds %d tokens, requests longer than that are refused", least)
    return tuple(specs)
