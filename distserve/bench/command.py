"""``distserve bench``: the options, their checks, and nothing else.

What it starts is imported when it runs, so that ``distserve --help`` needs neither aiohttp nor matplotlib.
"""

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import click

from distserve.bench.errors import BenchError
from distserve.bench.files import is_no_file
from distserve.bench.plan import make_plan
from distserve.bench.traces import FORMATS

_EPILOG = """\b
Examples
\b
  Poisson arrivals, 4 requests/s, for a minute, against an SLO:
    distserve bench http://127.0.0.1:8000 --rate 4 --duration 60 \\
        --prompt-len lognormal:mean=300,sigma=0.8,max=1500 \\
        --output-len lognormal:mean=60,sigma=0.6,max=256 --slo-ttft 1 --slo-tpot 0.06
\b
  Eight clients, each waiting for its answer:
    distserve bench http://127.0.0.1:8000 --clients 8 --num-requests 200
\b
  The largest rate that meets the SLO for 90% of requests, with plots:
    distserve bench URL --find-goodput --slo-ttft 1 --slo-tpot 0.06 --output-dir out
\b
  A sweep, drawn as attainment over rate:
    distserve bench URL --rate 1,2,4,8 --duration 60 --slo-ttft 1 --slo-tpot 0.06 --output-dir out
\b
  Ten minutes of an Azure trace at a third of its rate, lengths scaled to a 2048-token context:
    distserve bench URL --trace azure2023_conv.csv --trace-end 600 --time-scale 3 --fit-context 2048
\b
Latencies count from the scheduled arrival. OPENAI_API_KEY is sent as the bearer token if set.
"""


@click.command(epilog=_EPILOG, context_settings={"max_content_width": 110, "show_default": True})
@click.argument("url")
@click.option("--model", default="", help="Model name; the server's first by default.", show_default=False)
@click.option("--chat", is_flag=True, help="Ask /v1/chat/completions (text prompts) instead of /v1/completions.")
@click.option("--rate", "rates", metavar="R[,R...]", help="Open loop: requests/s; several make a sweep.")
@click.option("--clients", type=click.IntRange(1), help="Closed loop: so many clients, each waiting for its answer.")
@click.option(
    "--arrivals",
    type=click.Choice(["poisson", "gamma", "trace"]),
    help="Open loop's gaps. A trace with timestamps brings its own unless --rate, --clients or --find-goodput is "
    "given; `trace` with --rate or --find-goodput scales them to the mean rate asked for.  [default: poisson]",
)
@click.option("--cv", type=click.FloatRange(0), help="Coefficient of variation of gamma gaps: 1 is Poisson, 2 bursty.")
@click.option("--num-requests", type=click.IntRange(1), help="Stop sending after so many.  [default: 100 if unbounded]")
@click.option("--duration", type=click.FloatRange(0, min_open=True), help="Stop sending after so many seconds.")
@click.option(
    "--prompt-len",
    metavar="LEN",
    help="Prompt tokens: 256, lognormal:mean=300,sigma=0.8[,max=1500] or normal:mean=1200,std=360.  [default: 256]",
)
@click.option("--output-len", metavar="LEN", help="Output tokens, in the same forms.  [default: 64]")
@click.option(
    "--trace", "trace_path", type=click.Path(path_type=Path), help="Lengths (and arrivals) from a trace file."
)
@click.option("--trace-format", type=click.Choice(["auto", *FORMATS]), default="auto", help="Format of the trace.")
@click.option("--trace-start", type=click.FloatRange(0), default=0.0, help="Begin at this second of the trace.")
@click.option("--trace-end", type=click.FloatRange(0), help="End before this second of the trace.")
@click.option(
    "--time-scale",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    help="Stretch a trace's own times: 2 halves its rate.",
)
@click.option("--length-scale", type=click.FloatRange(0, min_open=True), default=1.0, help="Multiply every length.")
@click.option(
    "--fit-context",
    type=click.IntRange(2),
    help="Scale a trace's lengths down, in proportion, until the longest prompt + output fits.",
)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="tokenizer.json (or its directory) that counts ShareGPT texts.",
)
@click.option(
    "--prompt-text",
    is_flag=True,
    help="Send text, for servers without token-id prompts; lengths are then approximate.",
)
@click.option(
    "--vocab-size",
    type=click.IntRange(1),
    help="Token ids are drawn below this.  [default: asked from the server]",
)
@click.option(
    "--plain",
    is_flag=True,
    help="Send OpenAI's own fields only (no ignore_eos, min_tokens, return_token_ids).",
)
@click.option("--return-timeline", is_flag=True, help="Ask for and keep the server's timeline of each request.")
@click.option("--extra-body", metavar="JSON", help="Fields merged into every request, e.g. '{\"temperature\": 1}'.")
@click.option("--slo-ttft", type=click.FloatRange(0, min_open=True), help="Limit on TTFT, seconds.")
@click.option("--slo-tpot", type=click.FloatRange(0, min_open=True), help="Limit on TPOT, seconds.")
@click.option(
    "--attainment",
    "target_share",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.9,
    help="Share of offered requests that is to meet both.",
)
@click.option(
    "--warmup",
    type=click.FloatRange(0),
    help="Do not count requests of the first so many seconds.  [default: 0; a fifth of a probe]",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=600.0,
    help="Seconds after its arrival at which a request is given up.",
)
@click.option("--find-goodput", is_flag=True, help="Bisect for the largest rate that meets the SLO in a steady state.")
@click.option("--min-rate", type=click.FloatRange(0, min_open=True), default=0.05, help="Lowest rate to probe.")
@click.option("--max-rate", type=click.FloatRange(0, min_open=True), default=1000.0, help="Highest rate to probe.")
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.05,
    help="Width of the bracket to reach, relative.",
)
@click.option("--max-probes", type=click.IntRange(1), default=12, help="Probes at most.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Seed of arrivals, lengths and prompts.")
@click.option("--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="Write the JSON result here.")
@click.option(
    "--output-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write result.json and PNG plots here.",
)
@click.option("--token-times", is_flag=True, help="Keep every token's time in the JSON.")
def bench(url: str, **options: Any) -> None:
    """Measure an OpenAI-compatible server at URL: ours, vLLM, llama.cpp or another.

    Prompts are random token ids of exact length and outputs are forced to theirs, so that two servers get the same
    work. Open loop by default: requests arrive when they are due, whether or not the server keeps up.
    """
    # Heavy, and needed only here: `distserve --help` must not wait for them.
    from rich.console import Console

    from distserve.bench.progress import Progress
    from distserve.bench.report import exit_code, print_report, to_document, write_json
    from distserve.bench.session import run_session

    try:
        plan = make_plan(url, options)
        directory: Path | None = options["output_dir"]
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
        # Now, not after an hour's measurement.
        for place in filter(None, (directory, _folder_of(options["output"]))):
            if not os.access(place, os.W_OK | os.X_OK):
                raise click.ClickException(f"cannot write into {place}: not there, or not allowed")
        outcome = asyncio.run(run_session(plan, Progress(Console(stderr=True)), os.environ.get("OPENAI_API_KEY")))
        if plan.workload.trace is not None and plan.workload.trace.note:
            outcome.notes.append(plan.workload.trace.note)
        print_report(Console(), outcome, plan.slo, plan.warmup)
        shown = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
        document = to_document(
            outcome, shown, plan.target.url, plan.slo, plan.warmup, token_times=options["token_times"]
        )
        if options["output"] is not None:
            write_json(options["output"], document)
        if directory is not None:
            from distserve.bench.plots import write_plots

            write_json(directory / "result.json", document)
            written = write_plots(
                directory, outcome, plan.slo, plan.warmup, f"{outcome.model} at {plan.target.base_url}"
            )
            click.echo(f"{directory}: result.json, {', '.join(path.name for path in written)}")
    except BenchError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"cannot write the result: {error}") from error
    sys.exit(exit_code(outcome))


def _folder_of(output: Path | None) -> Path | None:
    """The directory that must be writable for a result in ``output``; None without one, and for pipes and terminals."""
    return None if output is None or is_no_file(output) else output.resolve().parent
