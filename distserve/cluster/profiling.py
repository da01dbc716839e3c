"""``distserve profile`` from checked settings to a written file: the engine first, then the cluster around it."""

import hashlib
import os
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from distserve.cluster.costs import make_loads, measure_costs
from distserve.cluster.process import own_cores
from distserve.cluster.profile_file import write_profile
from distserve.core.config import KvConfig
from distserve.core.errors import ConfigError
from distserve.core.profile import (
    FORMAT,
    ClusterCosts,
    MeasuredStepTime,
    Measurement,
    Profile,
    StepFit,
    residuals,
)
from distserve.engine.description import describe
from distserve.engine.fit import fit_steps
from distserve.engine.profile import make_grid, measure
from distserve.engine.worker import Worker

_BUSY = 0.35
"""Load average per core beyond which something else is running."""
_PACKAGES = ("distserve", "torch", "transformers")


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured, and how long. ``max_model_len`` None: the model's."""

    model_dir: Path
    dtype: str
    num_threads: int
    block_size: int
    kv_tokens: int
    max_batch_tokens: int
    max_batch_size: int
    max_model_len: int | None
    num_rounds: int
    is_quick: bool
    with_cluster: bool


def take_profile(settings: Settings, output: Path, console: Console) -> Profile:
    """Measure, write, and show what came of it.

    Raises:
        ConfigError: the model or the output path is wrong.
        InstanceError: the cluster to be measured did not start.
    """
    if not output.parent.is_dir():
        raise ConfigError(f"{output.parent} is no directory to write {output.name} to")
    description = describe(settings.model_dir)
    max_model_len = min(settings.max_model_len or description.max_model_len, description.max_model_len)
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    if load > _BUSY:
        console.print(
            f"[yellow]the machine is busy (load {load:.2f} per core): the profile will tell of that too[/yellow]"
        )
    measurements = _measure_engine(settings, max_model_len, console)
    fit = fit_steps(measurements)
    step_time = MeasuredStepTime(fit)
    decodes = [m for m in measurements if m.shape.num_prefill_tokens == 0]
    prompts = [m for m in measurements if m.shape.num_prefill_tokens and not m.shape.num_decodes]
    mixed = [m for m in measurements if m.shape.num_prefill_tokens and m.shape.num_decodes]
    groups = {"decode": decodes, "prefill": prompts, "mixed": mixed}
    cluster: ClusterCosts | None = None
    if settings.with_cluster:
        num_engines = len(os.sched_getaffinity(0)) // settings.num_threads
        with console.status("") as status:
            cluster = measure_costs(
                settings.model_dir,
                {
                    "dtype": settings.dtype,
                    "threads": settings.num_threads,
                    "block_size": settings.block_size,
                    "max_batch_tokens": settings.max_batch_tokens,
                    "max_batch_size": settings.max_batch_size,
                    "max_model_len": max_model_len,
                },
                step_time,
                make_loads(num_engines, settings.max_batch_size, max_model_len, quick=settings.is_quick),
                layout=description.layout(KvConfig(64, settings.block_size), settings.dtype),
                vocab_size=description.vocab_size,
                show=lambda text: status.update(f"cluster: {text}"),
            )
    profile = Profile(
        format=FORMAT,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=describe_machine(),
        model=settings.model_dir.resolve().name,
        model_digest=hashlib.sha256((settings.model_dir / "config.json").read_bytes()).hexdigest(),
        dtype=settings.dtype,
        num_threads=settings.num_threads,
        block_size=settings.block_size,
        token_bytes=description.token_bytes(settings.dtype),
        limits={
            "kv_tokens": settings.kv_tokens,
            "max_batch_tokens": settings.max_batch_tokens,
            "max_batch_size": settings.max_batch_size,
            "max_model_len": max_model_len,
            "rounds": settings.num_rounds,
        },
        measurements=tuple(measurements),
        fit=fit,
        residuals={name: residuals(step_time, group) for name, group in groups.items() if group},
        cluster=cluster,
    )
    write_profile(profile, output)
    _show(profile, output, console)
    return profile


def _measure_engine(settings: Settings, max_model_len: int, console: Console) -> list[Measurement]:
    """In this process, on the CPUs that an instance of a small cluster would have to itself."""
    grid = make_grid(settings.max_batch_tokens, settings.max_batch_size, max_model_len, quick=settings.is_quick)
    cores = os.sched_getaffinity(0)
    columns = (TextColumn("engine"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=None)
        own = own_cores(0, settings.num_threads, settings.num_threads)
        try:
            if own:
                os.sched_setaffinity(0, own)
            worker = Worker(
                settings.model_dir,
                dtype=settings.dtype,
                kv=KvConfig(max(1, settings.kv_tokens // settings.block_size), settings.block_size),
                num_threads=settings.num_threads,
            )
            return measure(
                worker,
                grid,
                num_rounds=settings.num_rounds,
                on_progress=lambda done, total: progress.update(task, completed=done, total=total),
            )
        finally:
            os.sched_setaffinity(0, cores)


def describe_machine() -> dict[str, str | int | float]:
    """What a profile must be read with: processor, memory, versions, and how busy the machine was."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count() or 1,
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": round(os.getloadavg()[0], 2),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
    }


def _show(profile: Profile, output: Path, console: Console) -> None:
    table = RichTable(title=f"{profile.model}, {profile.dtype}, {profile.num_threads} threads")
    for column in ("steps", "points", "median error of the fit", "90th percentile", "worst"):
        table.add_column(column, justify="left" if column == "steps" else "right")
    for name, errors in profile.residuals.items():
        table.add_row(name, str(errors.count), *(f"{value:.1%}" for value in (errors.median, errors.p90, errors.worst)))
    console.print(table)
    console.print(_summary(profile.fit))
    if profile.cluster is not None:
        costs = profile.cluster
        console.print(
            f"A cluster adds {costs.step * 1e3:.2f} ms to a step and {costs.step_per_sequence * 1e6:.0f} us per "
            f"sequence of it; a message takes {costs.message * 1e3:.2f} ms, a request {costs.request * 1e3:.1f} ms and "
            f"{costs.request_per_token * 1e6:.1f} us per prompt token to come in, a token {costs.token * 1e3:.2f} ms "
            f"to go out, KV {costs.pull * 1e3:.2f} ms and {1e-9 / max(costs.pull_per_byte, 1e-15):.1f} GB/s to move."
        )
    console.print(f"written to {output}")


def _summary(fit: StepFit) -> str:
    prefill, decode = fit.prefill, fit.decode
    num = prefill.knots[-1]
    return (
        f"{num} prompt tokens in {prefill.values[-1] * 1e3:.1f} ms ({num / prefill.values[-1]:.0f} tokens/s); a decode "
        f"step of {decode.batches[0]} in {decode.values[0][0] * 1e3:.1f} ms, of {decode.batches[-1]} in "
        f"{decode.values[-1][0] * 1e3:.1f} ms at {decode.contexts[0]} tokens of context each"
    )
