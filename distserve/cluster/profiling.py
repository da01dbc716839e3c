"""``distserve profile`` from checked settings to a written file: the engine in each shape first, then a cluster."""

import hashlib
import os
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from distserve.cluster.profile_file import write_profile
from distserve.cluster.profile_shape import EngineSettings, check_shapes, profile_shape
from distserve.core.config import KvConfig, ParallelConfig
from distserve.core.errors import ConfigError
from distserve.core.latency import StepShape
from distserve.core.profile import (
    FORMAT,
    ONE_RANK,
    ClusterCosts,
    MeasuredStepTime,
    Profile,
    ShapeProfile,
    own_pairs,
    shape_name,
)
from distserve.engine.description import ModelDescription, describe
from distserve.engine.profile import make_grid

_BUSY = 0.35
"""Load average per core beyond which something else is running."""
_PACKAGES = ("distserve", "torch", "transformers")


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured, in which ``shapes``, and how long. ``max_model_len`` None: the model's."""

    engine: EngineSettings
    shapes: tuple[ParallelConfig, ...]
    max_batch_tokens: int
    max_model_len: int | None
    num_rounds: int
    is_quick: bool
    with_cluster: bool


def take_profile(settings: Settings, output: Path, console: Console) -> Profile:
    """Measure, write, and show what came of it.

    Raises:
        ConfigError: the model, a shape or the output path is wrong.
        InstanceError: the cluster to be measured did not start, or a rank of an instance was lost.
    """
    engine = settings.engine
    if not output.parent.is_dir():
        raise ConfigError(f"{output.parent} is no directory to write {output.name} to")
    if not os.access(output.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"nothing can be written to {output.parent}")
    if settings.with_cluster and (engine.device != "cpu" or ONE_RANK not in settings.shapes):
        raise ConfigError(
            "what a cluster adds is measured with instances of one rank on CPUs: add "
            + ("--engine-only" if engine.device != "cpu" else "--shape 1x1, or --engine-only")
        )
    description = describe(engine.model_dir)
    check_shapes(engine, settings.shapes)
    max_model_len = min(settings.max_model_len or description.max_model_len, description.max_model_len)
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    if load > _BUSY:
        console.print(
            f"[yellow]the machine is busy (load {load:.2f} per core): the profile will tell of that too[/yellow]"
        )
    shapes = tuple(_measure_shape(settings, parallel, max_model_len, console) for parallel in settings.shapes)
    cluster = _measure_cluster(settings, shapes, description, max_model_len, console) if settings.with_cluster else None
    profile = Profile(
        format=FORMAT,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=describe_machine(engine.device),
        model=engine.model_dir.resolve().name,
        model_digest=hashlib.sha256((engine.model_dir / "config.json").read_bytes()).hexdigest(),
        dtype=engine.dtype,
        num_threads=engine.num_threads,
        block_size=engine.kv.block_size,
        token_bytes=description.token_bytes(engine.dtype),
        limits={
            "kv_tokens": engine.kv.num_tokens,
            "max_batch_tokens": settings.max_batch_tokens,
            "max_batch_size": settings.engine.max_batch_size,
            "max_model_len": max_model_len,
            "rounds": settings.num_rounds,
        },
        shapes=shapes,
        cluster=cluster,
    )
    write_profile(profile, output)
    _show(profile, output, console)
    return profile


def _measure_shape(settings: Settings, parallel: ParallelConfig, max_model_len: int, console: Console) -> ShapeProfile:
    grid = make_grid(settings.max_batch_tokens, settings.engine.max_batch_size, max_model_len, quick=settings.is_quick)
    name = "engine" if len(settings.shapes) == 1 else f"engine, {shape_name(parallel)}"
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=None)
        return profile_shape(
            settings.engine,
            parallel,
            grid,
            num_rounds=settings.num_rounds,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )


def _measure_cluster(
    settings: Settings,
    shapes: tuple[ShapeProfile, ...],
    description: ModelDescription,
    max_model_len: int,
    console: Console,
) -> ClusterCosts:
    """With instances of one rank, whose steps have been measured."""
    # A machine where the engine alone is measured need not have what clients and servers are made of.
    from distserve.cluster.costs import make_loads, measure_costs

    engine = settings.engine
    one_rank = next(shape for shape in shapes if shape.parallel == ONE_RANK)
    with console.status("") as status:
        return measure_costs(
            engine.model_dir,
            {
                "dtype": engine.dtype,
                "threads": engine.num_threads,
                "block_size": engine.kv.block_size,
                "max_batch_tokens": settings.max_batch_tokens,
                "max_batch_size": settings.engine.max_batch_size,
                "max_model_len": max_model_len,
            },
            one_rank.step_time(None),
            make_loads(settings.engine.max_batch_size, max_model_len, quick=settings.is_quick),
            layout=description.layout(KvConfig(64, engine.kv.block_size), engine.dtype),
            vocab_size=description.vocab_size,
            show=lambda text: status.update(f"cluster: {text}"),
        )


def describe_machine(device: str = "cpu") -> dict[str, str | int | float]:
    """What a profile must be read with: processor, GPU (``cuda``), memory, versions, and how busy the machine was."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        **({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}),
        "cores": os.cpu_count() or 1,
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": round(os.getloadavg()[0], 2),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
    }


def _show(profile: Profile, output: Path, console: Console) -> None:
    table = RichTable(title=f"{profile.model}, {profile.dtype}, {profile.num_threads} threads: errors of the fit")
    for column in ("tp x pp", "steps", "points", "median", "90th percentile", "worst"):
        table.add_column(column, justify="left" if column in {"tp x pp", "steps"} else "right")
    for shape in profile.shapes:
        for name, errors in shape.residuals.items():
            figures = (f"{value:.1%}" for value in (errors.median, errors.p90, errors.worst))
            table.add_row(shape_name(shape.parallel), name, str(errors.count), *figures)
    console.print(table)
    for shape in profile.shapes:
        console.print(_summary(shape))
    if profile.cluster is not None:
        costs = profile.cluster
        console.print(
            f"A cluster adds {costs.step * 1e3:.2f} ms to a step and {costs.step_per_sequence * 1e6:.0f} us per "
            f"sequence of it; a message takes {costs.message * 1e3:.2f} ms, a request {costs.request * 1e3:.1f} ms and "
            f"{costs.request_per_token * 1e6:.1f} us per prompt token to come in, a token {costs.token * 1e3:.2f} ms "
            f"to go out, KV {costs.pull * 1e3:.2f} ms and {1e-9 / max(costs.pull_per_byte, 1e-15):.1f} GB/s to move."
        )
    console.print(f"written to {output}")


def _summary(shape: ShapeProfile) -> str:
    decode, num = shape.fit.decode, shape.fit.prefill.knots[-1]
    prompt = MeasuredStepTime(shape.fit).seconds(StepShape(num, own_pairs(num), num_prefills=1))
    text = (
        f"{shape_name(shape.parallel)}: {num} prompt tokens in {prompt * 1e3:.1f} ms "
        f"({num / prompt:.0f} tokens/s); a decode step of {decode.batches[0]} in "
        f"{decode.values[0][0] * 1e3:.1f} ms, of {decode.batches[-1]} in {decode.values[-1][0] * 1e3:.1f} ms at "
        f"{decode.contexts[0]} tokens of context each"
    )
    if shape.through is None:
        return text
    alone = shape.through.decode.values[0][0]
    return f"{text}, in every pipeline stage; {alone * 1e3:.1f} ms through all of them for the former, alone"
