"""The one instance of an :class:`distserve.LLM`: options checked as a file's, memory sized as a launch's."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distserve.cluster.config import EngineSection, EngineSettings
from distserve.cluster.describe import examine
from distserve.cluster.seats import WantedInstance
from distserve.cluster.sizing import KvRequest, free_memory
from distserve.cluster.specs import build_specs
from distserve.cluster.yaml_file import explain
from distserve.core.config import InstanceSpec, ParallelConfig, PrefillPolicy, Role
from distserve.core.errors import ConfigError


class _Options(EngineSection):
    mixed_policy: PrefillPolicy = PrefillPolicy.SPLITFUSE


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
        section = _Options.model_validate(options)
    except ValidationError as error:
        raise ConfigError(explain(error, None, {}, {}, _Options)) from error
    engine = EngineSettings(
        dtype=section.dtype,
        max_model_len=section.max_model_len,
        kv=KvRequest(
            section.kv_tokens, None if section.kv_memory is None else int(section.kv_memory), section.block_size
        ),
        max_batch_tokens=section.max_batch_tokens,
        max_batch_size=section.max_batch_size,
        threads=section.threads,
        prefix_caching=section.prefix_caching,
    )
    wanted = (WantedInstance(Role.MIXED, ParallelConfig()),)
    (spec,) = build_specs(
        wanted, engine, examine(directory, engine.dtype), policy=section.mixed_policy, free=free_memory()
    )
    return SizedInstance(spec, engine.dtype, engine.threads or len(os.sched_getaffinity(0)))
