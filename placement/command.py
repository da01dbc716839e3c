"""``distserve plan``: the options, their checks, the order of what is done; what it starts is imported when it runs."""

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

    from placement.outlook import Outlook
    from placement.plan import Plan
    from placement.problem import Problem

_WIDTH = 118

_EPILOG = """\b
Examples
\b
  The best goodput per GPU for the workload, objective and cluster of a file:
    distserve plan deploy/examples/opt-13b-sharegpt.yaml
\b
  The fewest GPUs that serve 40 requests/s, written down, with pictures:
    distserve plan service.yaml --rate 40 --output plan.yaml --plot plots
    distserve simulate service.yaml --placement plan.yaml
    distserve launch service.yaml
\b
  With step times measured on this hardware in place of the analytic model:
    distserve profile ./my-llama --output profile.json
    distserve plan service.yaml --profile profile.json
\b
  What the time of a step is made of, without planning:
    distserve plan service.yaml --explain-latency
    distserve plan service.yaml --explain-latency tp=2,prefill=2048
    distserve plan service.yaml --explain-latency tp=1,pp=2,decode=64,context=1200
\b
The file has the keys model, slo, workload and cluster; docs/planning.md explains them and the report.
"""


@click.command(epilog=_EPILOG, context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]})
@click.argument("config", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--rate",
    type=click.FloatRange(0, min_open=True),
    help="Requests/s to serve with the fewest GPUs.  [default: the file's; without one, the best goodput per GPU]",
)
@click.option(
    "--latency",
    type=click.Choice(["analytic", "profile", "distserve-a100", "aiconfigurator"]),
    help="Where the times of steps come from.  [default: the file's; profile with --profile; else analytic]",
)
@click.option(
    "--profile",
    "profile_path",
    type=click.Path(path_type=Path),
    help="What `distserve profile` measured, or DistServe's fits for --latency distserve-a100.",
)
@click.option("--jobs", type=click.IntRange(1), help="Processes that simulate.  [default: one per CPU]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of every random number.")
@click.option("--quick", is_flag=True, help="Shorter runs: wider intervals, a rough answer.")
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
@click.option(
    "--output",
    "-o",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the plan here, a YAML file for `distserve simulate` and `distserve launch`.",
)
@click.option("--plot", type=click.Path(file_okay=False, path_type=Path), help="Write PNG plots into this directory.")
@click.option(
    "--explain-latency",
    "shape",
    metavar="[SHAPE]",
    is_flag=False,
    flag_value="",
    help="Print the operations of one step, and stop. SHAPE: tp=2,prefill=2048 or tp=1,pp=2,decode=32,context=900.",
)
def plan(config: Path, **options: Any) -> None:
    """Find the placement that meets the objective of CONFIG at the least GPUs, and say why.

    How many prefill, decode or mixed instances, of what tensor and pipeline parallelism, on which GPUs: candidates are
    simulated on the workload's length distribution and arrivals, queues and KV transfers included, and the answer
    comes with what it predicts, what limits it, and what else came into question.
    """
    from rich.console import Console

    with _errors_for_humans():
        output: Path | None = options["output"]
        directory: Path | None = options["plot"]
        for place in filter(None, (directory and directory.parent, output and output.parent)):
            # Now, not after minutes of search.
            if not os.access(place, os.W_OK | os.X_OK):
                raise ConfigError(f"cannot write into {place}: not there, or not allowed")
        if output is not None and output.exists() and config.exists() and output.samefile(config):
            raise ConfigError(f"--output {output} would replace CONFIG itself: give the plan another name")
        problem = _problem(config, options)
        if options["shape"] is not None:
            from placement.explain import print_explanation

            print_explanation(_wide(Console()), problem, options["shape"])
            return
        found, outlook = _find(problem, config, Console(stderr=True), with_curves=directory is not None)
        _present(found, outlook, config, _wide(Console()), options)


def _wide(console: "Console") -> "Console":
    """Wide enough for the tables where no terminal sets the width: a file, a pipe."""
    if not console.is_terminal:
        console.width = _WIDTH
    return console


def _problem(config: Path, options: dict[str, Any]) -> "Problem":
    from placement.config import Overrides, load_problem

    return load_problem(
        config,
        Overrides(
            rate=options["rate"],
            latency=options["latency"],
            profile=options["profile_path"],
            seed=options["seed"],
            num_workers=options["jobs"],
            quick=options["quick"],
        ),
    )


def _find(problem: "Problem", config: Path, console: "Console", *, with_curves: bool) -> tuple["Plan", "Outlook"]:
    """Search and look around, with a progress bar on ``console``."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from placement.config import given_candidate
    from placement.search import find_plan
    from placement.sensitivity import look_around

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading the problem", total=None)

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total or None)

        found = find_plan(problem, show, given_candidate(config, problem))
        outlook = look_around(
            found, lambda done, total: show("looking around the plan", done, total), with_curves=with_curves
        )
    return found, outlook


def _present(found: "Plan", outlook: "Outlook", config: Path, console: "Console", options: dict[str, Any]) -> None:
    """Print, then write: each file whole or not at all."""
    import json

    from placement.document import to_document
    from placement.report import print_report

    if options["as_json"]:
        click.echo(json.dumps(to_document(found, outlook), indent=1, allow_nan=False))
    else:
        print_report(console, found, outlook)
    written = []
    if options["output"] is not None:
        from placement.planfile import write_plan

        write_plan(options["output"], found, config)
        written.append(options["output"])
    if options["plot"] is not None:
        from placement.plots import write_plots

        options["plot"].mkdir(exist_ok=True)
        written += write_plots(options["plot"], found, outlook)
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
