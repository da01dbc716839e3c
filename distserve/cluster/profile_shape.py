"""The engine of one shape, measured and fitted: the part of ``distserve profile`` that is done once per shape."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from distserve.cluster.process import own_cores
from distserve.core.config import KvConfig, ParallelConfig
from distserve.core.profile import MeasuredStepTime, Measurement, ShapeProfile, residuals
from distserve.engine.description import describe_config, load_config
from distserve.engine.fit import fit_steps
from distserve.engine.group.driver import RankGroup
from distserve.engine.group.memory import check_devices
from distserve.engine.profile import Grid, measure
from distserve.engine.sharding.shard import shard_of
from distserve.engine.worker import Worker


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What an engine is made of; ``device`` is ``cpu`` or ``cuda``, ``num_threads`` each rank's.

    ``max_batch_size`` is the most sequences of a decode batch, which a GPU prepares for.
    """

    model_dir: Path
    device: str
    dtype: str
    num_threads: int
    kv: KvConfig
    max_batch_size: int


def check_shapes(settings: EngineSettings, shapes: tuple[ParallelConfig, ...]) -> None:
    """Raise ConfigError unless the model can be cut into all ``shapes``, and the machine has devices for them."""
    config = load_config(settings.model_dir)
    description = describe_config(config, settings.model_dir)
    for parallel in shapes:
        shard_of(description, config.num_attention_heads, parallel, 0)
        check_devices(parallel, settings.device, range(parallel.num_ranks))


def profile_shape(
    settings: EngineSettings,
    parallel: ParallelConfig,
    grid: Grid,
    *,
    num_rounds: int,
    on_progress: Callable[[int, int], None],
) -> ShapeProfile:
    """Start an engine of shape ``parallel``, time its steps over ``grid`` and fit the formulas to them.

    Raises:
        ConfigError: the model cannot be loaded in this shape, or the KV memory holds no point of the grid.
        InstanceError: a rank was lost; says which, and of what.
    """
    with _engine(settings, parallel) as engine:
        measurements = measure(engine, grid, num_rounds=num_rounds, on_progress=on_progress)
    fit = fit_steps(measurements)
    step_time = MeasuredStepTime(fit)
    kinds = {name: [m for m in measurements if _kind(m) == name] for name in ("decode", "prefill", "mixed")}
    errors = {name: residuals(step_time, members) for name, members in kinds.items() if members}
    if parallel.pp == 1:
        return ShapeProfile(parallel, fit, tuple(measurements), errors)
    alone = [replace(m, median=m.through) for m in measurements if m.through is not None]
    through = fit_steps(alone)
    errors["through all stages"] = residuals(MeasuredStepTime(through), alone)
    return ShapeProfile(parallel, fit, tuple(measurements), errors, through)


def _kind(measurement: Measurement) -> str:
    shape = measurement.shape
    if not shape.num_prefill_tokens:
        return "decode"
    return "mixed" if shape.num_decodes else "prefill"


@contextmanager
def _engine(settings: EngineSettings, parallel: ParallelConfig) -> Iterator[Worker | RankGroup]:
    """An engine on the CPUs that an instance of a small cluster would have to itself: a rank's own for each rank."""
    before = os.sched_getaffinity(0)
    num_cores = settings.num_threads * parallel.num_ranks
    cores = own_cores(0, num_cores, num_cores) if settings.device == "cpu" else ()
    group: RankGroup | None = None
    try:
        if cores:
            os.sched_setaffinity(0, cores[: settings.num_threads])
        if parallel.num_ranks == 1:
            yield Worker(
                settings.model_dir,
                dtype=settings.dtype,
                kv=settings.kv,
                num_threads=settings.num_threads,
                device=settings.device,
                max_batch_size=settings.max_batch_size,
            )
        else:
            group = RankGroup(
                settings.model_dir,
                parallel=parallel,
                kv=settings.kv,
                dtype=settings.dtype,
                device=settings.device,
                num_threads=settings.num_threads,
                cores=cores,
            )
            yield group
    finally:
        if group is not None:
            group.shutdown()
        os.sched_setaffinity(0, before)
