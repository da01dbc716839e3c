"""The command line. Light on purpose: each command imports what it needs when it runs, so that ``--help`` is instant.

Commands of other packages (simulator, placement) join through the entry point group ``distserve.commands``; they are
loaded when called.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click

import distserve
from distserve.core.errors import DistserveError

_BENCH = "bench"


class _LazyGroup(click.Group):
    """A group whose further commands are found, by name, in other modules and packages when they are needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), _BENCH, *entry_points(group="distserve.commands").names})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == _BENCH:
            from distserve.bench.command import bench

            return bench
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        for entry in entry_points(group="distserve.commands", name=cmd_name):
            command = entry.load()
            assert isinstance(command, click.Command), f"{entry.value} is no click command"
            return command
        return None


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(distserve.__version__, prog_name="distserve")
def main() -> None:
    """Serve large language models with prefill and decode on separate instances.

    \b
    distserve demo                                    a first answer, nothing needed
    distserve serve ./my-llama --prefill 2 --decode 1 an OpenAI-compatible endpoint
    distserve bench --help                            load for any such endpoint
    """  # noqa: D301 - click reads the control character


@main.command()
@click.argument("model", required=False)
@click.option("--config", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="YAML file; flags win.")
@click.option("--prefill", type=int, help="Prefill instances.  [default: 1; 0 with --mixed]")
@click.option("--decode", type=int, help="Decode instances.  [default: 1; 0 with --mixed]")
@click.option("--mixed", type=int, help="Instances that do both, alone or beside --prefill.")
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=int, help="Port to listen on; 0 picks a free one.  [default: 8000]")
@click.option("--ray-address", help="Join this Ray cluster (host:port, or auto) in place of a local one.")
@click.option("--gpu", type=int, help="Place all instances on this GPU, counted from 0.  [default: compute on CPUs]")
@click.option("--dtype", help="float32 or bfloat16, for weights and KV.  [default: float32]")
@click.option("--max-model-len", type=int, help="Most tokens of prompt and output together.  [default: the model's]")
@click.option(
    "--kv-tokens",
    type=int,
    help="KV memory of each instance, in tokens.  [default: 256 MiB, or a whole sequence]",
)
@click.option("--kv-memory", type=float, help="KV memory of each instance, in bytes, in place of --kv-tokens.")
@click.option("--prefix-caching", is_flag=True, default=None, help="Compute and move what prompts have in common once.")
@click.option("--prefix-cache-tokens", type=int, help="Most unused KV kept for it, in tokens.  [default: all memory]")
@click.option("--block-size", type=int, help="Tokens per KV block.  [default: 16]")
@click.option(
    "--max-batch-tokens",
    type=int,
    help="Tokens per step: of prompts on prefill instances, of all on mixed ones.  [default: by --profile, or 512]",
)
@click.option(
    "--profile",
    type=click.Path(exists=True, dir_okay=False, path_type=Path, resolve_path=True),
    help="What `distserve profile` measured here: --max-batch-tokens is where throughput saturates.",
)
@click.option(
    "--mixed-policy",
    help="splitfuse (prompts are split to fill steps beside decoding) or whole (never split, before any decoding).  "
    "[default: splitfuse]",
)
@click.option("--max-batch-size", type=int, help="Sequences per decode batch.  [default: 64]")
@click.option(
    "--kv-transport",
    help="auto, shm, tcp or nccl: how KV moves from prefill to decode. auto takes shared memory within a host and TCP "
    "between hosts, between GPUs NCCL if there is CuPy; the others take nothing else.  [default: auto]",
)
@click.option(
    "--kv-interface",
    help="Network that KV moves over between nodes, and that ranks of an instance on several listen on: an interface "
    "that all have (eth1), or a network they have addresses in (10.1.0.0/16).  [default: the addresses that Ray knows]",
)
@click.option("--threads", type=int, help="CPU threads of each instance.  [default: an equal share of the CPUs]")
@click.option("--drain-timeout", type=float, help="Seconds that requests may finish in when stopping.  [default: 30]")
@click.option("--api-key", envvar="DISTSERVE_API_KEY", help="Key that clients must send.  [default: none]")
@click.option("--served-model-name", help="Name in the API; several by commas.  [default: the directory's name]")
@click.option("--event-log", help="Directory for a replayable log of every scheduler's events and commands.")
def serve(model: str | None, config: Path | None, **flags: Any) -> None:
    """Serve MODEL, a Hugging Face model directory, on an OpenAI-compatible endpoint.

    MODEL defaults to the embedded demo model. Without --ray-address a local Ray cluster is started, and stopped at the
    end. SIGTERM or Ctrl-C lets running requests finish first; a second one stops at once.

    \b
    distserve serve
    distserve serve ./my-llama --prefill 2 --decode 1 --dtype bfloat16 --port 8000
    distserve serve --config deploy/example.yaml
    """  # noqa: D301 - click reads the control character
    from rich.console import Console

    from distserve.cluster.config import load_config
    from distserve.cluster.serve import serve as run
    from distserve.demo import model_dir

    with _errors_for_humans():
        run(load_config(config, _by_path(model, flags), model_dir()), Console(stderr=True))


@main.command()
@click.argument("question", required=False)
@click.option("--prefill", type=int, help="Prefill instances.  [default: 1]")
@click.option("--decode", type=int, help="Decode instances.  [default: 1]")
def demo(question: str | None, **flags: Any) -> None:
    """Ask the embedded demo model a QUESTION and show where the time of the answer went.

    Starts a local Ray cluster with one prefill and one decode instance, streams one chat answer through the HTTP
    endpoint, and stops everything again.
    """
    from rich.console import Console

    from distserve.cluster.config import load_config
    from distserve.cluster.demo import QUESTION
    from distserve.cluster.demo import demo as run
    from distserve.demo import model_dir

    with _errors_for_humans():
        run(load_config(None, _by_path(None, flags), model_dir()), question or QUESTION, Console())


@main.command(name="role")
@click.argument("instance", required=False)
@click.argument("role", required=False, type=click.Choice(["prefill", "decode", "mixed"]))
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="Where distserve serves.")
@click.option("--api-key", envvar="DISTSERVE_API_KEY", help="Its API key, if it has one.")
@click.option(
    "--patience",
    type=click.FloatRange(0),
    help="Seconds to end what the instance has; what is left then goes on elsewhere.  [default: 30]",
)
@click.option("--wait/--no-wait", default=True, help="Return when the instance has changed.  [default: wait]")
def change_role(
    instance: str | None, role: str | None, url: str, api_key: str | None, patience: float | None, *, wait: bool
) -> None:
    """Let INSTANCE of a running deployment become ROLE while it serves; without either, list all instances.

    It gets no new requests, ends what it has, and goes on in its new role with the same weights and memory.
    """
    import asyncio

    from rich.console import Console

    from distserve.cluster.role_command import change_role as change
    from distserve.cluster.role_command import show_roles

    with _errors_for_humans():
        if instance is None:
            asyncio.run(show_roles(Console(), url.rstrip("/"), api_key))
        elif role is None:
            raise click.UsageError("name the role that it is to have: prefill, decode or mixed")
        else:
            asyncio.run(change(Console(), url.rstrip("/"), api_key, instance, role, patience, wait=wait))


def _by_path(model: str | None, flags: dict[str, Any]) -> dict[str, Any]:
    """Flags under the names of the configuration file's keys."""
    pools = ("prefill", "decode", "mixed")
    serving = ("host", "port", "api_key", "served_model_name", "ray_address", "drain_timeout", "event_log")
    named = {"model": model}
    for name, value in flags.items():
        if name in pools:
            named[f"placement.{name}.instances"] = value
        else:
            named[f"{'serving' if name in serving else 'engine'}.{name}"] = value
    return named


@contextmanager
def _errors_for_humans() -> Iterator[None]:
    """Log warnings to standard error, and end with a sentence where the user is at fault."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        yield
    except DistserveError as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
