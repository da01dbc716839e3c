"""``distserve profile``: the options, and the order in which things are measured."""

from pathlib import Path

import click

from distserve.core.errors import DistserveError

_EPILOG = """\b
Examples
\b
  Both parts, three to five minutes for a small model on two cores:
    distserve profile ./my-llama --dtype bfloat16 --output my-llama.json
\b
  The engine's own steps alone, thinned out, to see whether it works at all:
    distserve profile ./my-llama --engine-only --quick --output rehearsal.json
\b
What it is for: `distserve simulate` and `distserve plan` predict from it, with `gpu: cpu` and this file as the
source of latencies. Take it with nothing else running, with the dtype, threads and block size that you will serve
with: a profile knows one instance of TP 1 and PP 1 on this machine, and nothing about others.
"""
_ROUNDS = 6


@click.command(epilog=_EPILOG, context_settings={"max_content_width": 110, "show_default": True})
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where the profile is written.  [default: MODEL's name with .profile.json, here]",
    show_default=False,
)
@click.option("--dtype", default="float32", help="float32 or bfloat16, for weights and KV.")
@click.option("--threads", type=click.IntRange(1), default=1, help="CPU threads of an instance.")
@click.option("--block-size", type=click.IntRange(1, 256), default=16, help="Tokens per KV block.")
@click.option(
    "--kv-tokens", type=click.IntRange(1), default=65536, help="KV memory to measure in; larger batches are left out."
)
@click.option(
    "--max-batch-tokens", type=click.IntRange(2), default=512, help="Largest prefill batch, as you will serve."
)
@click.option("--max-batch-size", type=click.IntRange(1), default=64, help="Largest decode batch, as you will serve.")
@click.option(
    "--max-model-len", type=click.IntRange(4), help="Longest sequence.  [default: the model's]", show_default=False
)
@click.option(
    "--rounds", type=click.IntRange(1), default=_ROUNDS, help="Visits of each point; its time is their median."
)
@click.option("--engine-only", is_flag=True, help="Leave out what a cluster adds: scheduling, messages, HTTP.")
@click.option("--quick", is_flag=True, help="A thin grid and one round, to rehearse.")
def profile(
    model: Path,
    output: Path | None,
    dtype: str,
    threads: int,
    block_size: int,
    kv_tokens: int,
    max_batch_tokens: int,
    max_batch_size: int,
    max_model_len: int | None,
    rounds: int,
    engine_only: bool,
    quick: bool,
) -> None:
    """Measure how long steps of MODEL take on this machine, and write it to a file that predictions are made from.

    MODEL is a Hugging Face directory. First the engine's own prefill and decode steps are timed over a grid of batch
    sizes and lengths, and formulas are fitted to them, whose errors are shown. Then a cluster of one prefill and one
    decode instance is started and asked over HTTP, to see what scheduling, messages and streaming add.
    """
    from rich.console import Console

    from distserve.cluster.profiling import Settings, take_profile

    console = Console(stderr=True)
    try:
        settings = Settings(
            model_dir=model,
            dtype=dtype,
            num_threads=threads,
            block_size=block_size,
            kv_tokens=kv_tokens,
            max_batch_tokens=max_batch_tokens,
            max_batch_size=max_batch_size,
            max_model_len=max_model_len,
            num_rounds=1 if quick else rounds,
            is_quick=quick,
            with_cluster=not engine_only,
        )
        take_profile(settings, output or Path(f"{model.resolve().name}.profile.json"), console)
    except DistserveError as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None
