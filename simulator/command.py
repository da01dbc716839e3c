"""``distserve simulate``: the options, their checks and the order of what is done; imports wait until it runs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from distserve.bench.errors import BenchError
from distserve.core.errors import ConfigError, DistserveError

if TYPE_CHECKING:
    from rich.console import Console

    from simulator.replay import Replay

_WIDTH = 118
_EPILOG = """\b
Examples
\b
  What the planner found, at the rate it was planned for:
    distserve plan service.yaml --output plan.yaml
    distserve simulate service.yaml --placement plan.yaml
\b
  A placement of your own (the file's section placement), at 12 requests/s for ten minutes:
    distserve simulate service.yaml --rate 12 --duration 600
\b
  With every request's timeline, plots, and a trace for https://ui.perfetto.dev:
    distserve simulate service.yaml --placement plan.yaml --timelines requests.parquet --plot plots \\
        --perfetto trace.json
\b
  What if an instance dies after a minute, and another is added at 90 seconds?
    distserve simulate service.yaml --fault 60:loss:decode-0 --fault 90:start:decode-1
\b
  What if an instance changes its role while it serves?
    distserve simulate service.yaml --fault 60:prefill:decode-1
\b
The file has the keys model, workload, cluster and placement, and slo to be held against; docs/planning.md explains
them, docs/timeline-format.md the columns of the timelines. Instances are called prefill-0, decode-1 and so on.
"""


@click.command(epilog=_EPILOG, context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]})
@click.argument("config", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--placement",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A plan, or any file with pools of instances.  [default: what CONFIG says under placement]",
)
@click.option(
    "--rate",
    type=click.FloatRange(0, min_open=True),
    help="Requests/s.  [default: the file's; else a trace's own times, or what the placement was planned for]",
)
@click.option(
    "--requests",
    type=click.IntRange(1),
    help="Stop offering after so many.  [default: all of a trace; 2000 of a distribution without --duration]",
)
@click.option("--duration", type=click.FloatRange(0, min_open=True), help="Stop offering after so many seconds.")
@click.option("--warmup", type=click.FloatRange(0), default=0.0, help="Leave out who arrives in the first seconds.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of every random number.")
@click.option(
    "--latency",
    type=click.Choice(["analytic", "profile", "distserve-a100", "aiconfigurator"]),
    help="Where the times of steps come from.  [default: the file's; profile with --profile; else analytic]",
)
@click.option(
    "--profile",
    type=click.Path(path_type=Path),
    help="What `distserve profile` measured, or DistServe's fits for --latency distserve-a100.",
)
@click.option(
    "--fault",
    "faults",
    multiple=True,
    metavar="TIME:KIND:INSTANCE",
    help="At TIME seconds INSTANCE suffers a loss, a drain or a start (it is absent until then), or becomes a prefill, "
    "decode or mixed one. Repeatable.",
)
@click.option(
    "--timelines",
    "--csv",
    "--parquet",
    "timelines",
    multiple=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write every request's timeline here: .csv, .csv.gz or .parquet. Repeatable.",
)
@click.option("--plot", type=click.Path(file_okay=False, path_type=Path), help="Write PNG plots into this directory.")
@click.option(
    "--perfetto",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a Chrome trace of every instance and link here, as JSON.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def simulate(config: Path, **options: Any) -> None:
    """Replay the workload of CONFIG through a placement, and say how it went.

    Instances, queues, KV memory and the network behave as in a deployment, for they run the same schedulers; only the
    time of a step is predicted. The same options give the same answer.
    """
    from rich.console import Console

    from simulator.replay import prepare

    with _errors_for_humans():
        _check_places(options)

        replay = prepare(config, options)
        _run(replay, options, Console(stderr=True))
        _present(replay, options)


def _check_places(options: dict[str, Any]) -> None:
    """Now, not after minutes of simulation."""
    from simulator.timeline_file import check_suffix

    timelines: tuple[Path, ...] = options["timelines"]
    for place in filter(None, (*timelines, options["plot"], options["perfetto"])):
        if not os.access(place.parent, os.W_OK | os.X_OK):
            raise ConfigError(f"cannot write into {place.parent}: not there, or not allowed")
    for path in timelines:
        check_suffix(path)


def _run(replay: "Replay", options: dict[str, Any], console: "Console") -> None:
    """Simulate, with a progress bar on ``console``; the Chrome trace is written meanwhile."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from distserve.bench.files import write_atomically

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("requests", total=len(replay.workload))

        def show(done: int) -> None:
            bar.update(task, completed=done)

        perfetto: Path | None = options["perfetto"]
        if perfetto is None:
            replay.run(show, with_batches=options["plot"] is not None)
        else:
            write_atomically(
                perfetto,
                lambda temporary: replay.run(show, with_batches=options["plot"] is not None, trace=temporary),
            )


def _present(replay: "Replay", options: dict[str, Any]) -> None:
    """Print, then write: each file whole or not at all."""
    import json

    from rich.console import Console

    from simulator.summary import print_summary, summarise, to_document
    from simulator.timeline_file import write_timelines

    summary = summarise(replay.simulation, replay.placement, replay.slo, options["warmup"])
    if options["as_json"]:
        click.echo(json.dumps(to_document(summary, replay.facts, replay.slo), indent=1, allow_nan=False))
    else:
        console = Console()
        if not console.is_terminal:
            # Wide enough for the tables where no terminal sets the width: a file, a pipe.
            console.width = _WIDTH
        print_summary(console, summary, replay.facts, replay.slo)
    written = [options["perfetto"]] if options["perfetto"] is not None else []
    for path in options["timelines"]:
        write_timelines(path, replay.simulation)
        written.append(path)
    if options["plot"] is not None:
        from simulator.plots import write_plots

        options["plot"].mkdir(exist_ok=True)
        assert replay.batches is not None
        title = f"{replay.facts['model']}, {replay.facts['placement']}, {summary.offered_rate:.3g} requests/s"
        written += write_plots(
            options["plot"], replay.simulation, replay.model, replay.batches, replay.slo, title, replay.faults
        )
    if written:
        click.echo(f"written: {', '.join(map(str, written))}", err=True)


@contextmanager
def _errors_for_humans() -> Iterator[None]:
    """End with a sentence where the user is at fault."""
    try:
        yield
    except (DistserveError, BenchError) as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"cannot write the result: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None
