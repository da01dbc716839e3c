"""The one instance of an :class:`distserve.LLM`: options checked as a file's, memory sized as a launch's."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distserve.cluster.config import EngineSection
from distserve.cluster.sizing import free_memory, size_kv
from distserve.cluster.yaml_file import explain
from distserve.core.budget import check_budget
from distserve.core.config import InstanceSpec, Role, SchedulerConfig
from distserve.core.errors import ConfigError
from distserve.engine.description import describe


@dataclass(frozen=True, slots=True)
class SizedInstance:
    """A mixed instance, and the threads it computes with."""

    spec: InstanceSpec
    dtype: str
    num_threads: int


def size_instance(directory: Path, options: dict[str, Any]) -> SizedInstance:
    """One mixed instance of the model in ``directory``; ``options`` are keys of the section ``engine``.

    Raises:
        ConfigError: an option is wrong, the directory is no model's, or memory does not suffice.
        UnsupportedModelError: the model cannot be served exactly.
    """
    try:
        engine = EngineSection.model_validate(options)
    except ValidationError as error:
        raise ConfigError(explain(error, None, {}, {}, EngineSection)) from error
    engine.check_prefix_cache()
    model = describe(directory)
    max_model_len = engine.max_model_len or model.max_model_len
    if max_model_len > model.max_model_len:
        raise ConfigError(
            f"max_model_len {max_model_len} is more than the model can take: at most {model.max_model_len}"
        )
    kv = size_kv(
        engine.kv(),
        weight_bytes=model.weight_bytes(engine.dtype),
        token_bytes=model.token_bytes(engine.dtype),
        max_model_len=max_model_len,
        num_instances=1,
        num_ranks=1,
        free=free_memory(),
    )
    scheduler = SchedulerConfig(
        max_batch_tokens=engine.max_batch_tokens,
        max_batch_size=engine.max_batch_size,
        max_model_len=max_model_len,
        prefix_caching=engine.prefix_caching,
        prefix_cache_tokens=engine.prefix_cache_tokens,
        policy=engine.mixed_policy,
    )
    spec = InstanceSpec("mixed-0", Role.MIXED, kv, scheduler)
    spec.check_prefix_cache()
    check_budget(spec)
    return SizedInstance(spec, engine.dtype, engine.threads or len(os.sched_getaffinity(0)))
