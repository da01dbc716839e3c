"""Our endpoint over engines that keep time: what clients find there differs by the clients alone.

    python -m benchmarks.outside_clients.steady MODEL --port 8000

One prefill and one decode instance within one process. They compute every step, and end it when a plan says so, which
for a small model is several times later: the machine's speed, which changes by a third, does not show.
"""

import argparse
import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import uvicorn

from distserve.api.app import create_app
from distserve.api.model import load_served_model
from distserve.api.settings import ApiSettings
from distserve.cluster import rank
from distserve.cluster.clock import cluster_time
from distserve.cluster.local import LocalCluster
from distserve.core.commands import RunStep
from distserve.core.config import KvConfig, SchedulerConfig
from distserve.core.events import StepDone
from distserve.engine.worker import Worker

_PREFILL, _PROMPT_TOKEN = 0.012, 0.00015
_DECODE, _SEQUENCE = 0.02, 0.0004
"""Seconds of a step, and beside that of each of its tokens: the prefill instance is busy for three quarters of the time
with 32 clients. With a queue that never empties, medians of some dozens of requests would not repeat."""


class SteadyWorker(Worker):
    """Ends a step when its time has passed."""

    def run(self, step: RunStep, on_layer: Callable[[int], None] | None = None) -> StepDone:
        """See the base class."""
        num_tokens = sum(chunk.num_tokens for chunk in step.chunks)
        decodes = num_tokens == len(step.chunks)
        seconds = _DECODE + _SEQUENCE * num_tokens if decodes else _PREFILL + _PROMPT_TOKEN * num_tokens
        end = time.monotonic() + seconds
        done = super().run(step, on_layer)
        time.sleep(max(end - time.monotonic(), 0.0))
        return done


async def serve(model: Path, port: int) -> None:
    """Serve ``model`` until a signal comes."""
    # No cluster lets its user choose what its instances compute with; the module does not export the name.
    setattr(rank, "Worker", SteadyWorker)  # noqa: B010  mypy refuses the assignment
    scheduler = SchedulerConfig(max_batch_tokens=512, max_batch_size=64, max_model_len=2048)
    async with LocalCluster(model, kv=KvConfig(num_blocks=2048), scheduler=scheduler) as backend:
        app = create_app(backend, load_served_model(model), ApiSettings(), clock=cluster_time)
        options = uvicorn.Config(
            app, port=port, http="httptools", lifespan="off", access_log=False, log_level="warning"
        )
        await uvicorn.Server(options).serve()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("model", type=Path, help="directory that make_model.py wrote")
    arguments = parser.parse_args()
    asyncio.run(serve(arguments.model, arguments.port))
