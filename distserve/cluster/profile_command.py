"""``distserve profile``: the options, and the order in which things are measured."""

import re
from pathlib import Path

import click

from distserve.core.config import KvConfig, ParallelConfig
from distserve.core.errors import DistserveError

_EPILOG = """\b
Examples
\b
  Both parts, three to five minutes for a small model on two cores:
    distserve profile ./my-llama --dtype bfloat16 --output my-llama.json
\b
  Instances of two tensor-parallel shards and of two pipeline stages as well:
    distserve profile ./my-llama --shape 1x1 --shape 2x1 --shape 1x2 --output my-llama.json
\b
  The engine's own steps alone, thinned out, to see whether it works at all:
    distserve profile ./my-llama --engine-only --quick --output rehearsal.json
\b
What it is for: `distserve simulate` and `distserve plan` predict from it, with `gpu: cpu` and this file as the
source of latencies. Take it with nothing else running, with the dtype, threads and block size that you will serve
with, in every shape that you may want to serve: a plan has no others.
"""
_ROUNDS = 6
_SHAPE = re.compile(r"([1-9]\d{0,3})x([1-9]\d{0,3})")


def _shapes(_: click.Context, __: click.Parameter, texts: tuple[str, ...]) -> tuple[ParallelConfig, ...]:
    """``2x1`` and the like, each once, in the order given."""
    found: dict[ParallelConfig, None] = {}
    for text in texts:
        match = _SHAPE.fullmatch(text)
        if match is None:
            raise click.BadParameter(f"{text!r} is not tp x pp, such as 2x1 for two shards in one pipeline stage")
        found[ParallelConfig(int(match[1]), int(match[2]))] = None
    return tuple(found)


@click.command(epilog=_EPILOG, context_settings={"max_content_width": 110, "show_default": True})
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where the profile is written.  [default: MODEL's name with .profile.json, here]",
    show_default=False,
)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    default=("1x1",),
    callback=_shapes,
    metavar="TPxPP",
    help="Shards x pipeline stages of an instance to measure; may be repeated.",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Where to compute.")
@click.option("--dtype", default="float32", help="float32 or bfloat16, on GPUs also float16, for weights and KV.")
@click.option("--threads", type=click.IntRange(1), default=1, help="CPU threads of each rank.")
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
    shapes: tuple[ParallelConfig, ...],
    device: str,
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
    sizes and lengths, in each shape, and formulas are fitted to them, whose errors are shown. Then a cluster of one
    prefill and one decode instance of one rank is started and asked over HTTP, to see what scheduling, messages and
    streaming add; where there are not cores for both, one mixed instance.
    """
    from rich.console import Console

    from distserve.cluster.profile_shape import EngineSettings
    from distserve.cluster.profiling import Settings, take_profile

    console = Console(stderr=True)
    try:
        settings = Settings(
            engine=EngineSettings(
                model_dir=model,
                device=device,
                dtype=dtype,
                num_threads=threads,
                kv=KvConfig(max(1, kv_tokens // block_size), block_size),
                max_batch_size=max_batch_size,
            ),
            shapes=shapes,
            max_batch_tokens=max_batch_tokens,
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
