"""Our endpoint over engines that keep time: what clients find there differs by the clients alone.

    python -m benchmarks.outside_clients.steady --port 8000 --name demo

One prefill and one decode instance of the embedded demo model, within one process. They compute every step, and end it
when a plan says so, which is several times later: the machine's speed, which changes by a third, does not show.
"""

import argparse
import asyncio
import time
from collections.abc import Callable

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
from distserve.demo import model_dir
from distserve.engine.worker import Worker

_STEP, _TOKEN = 0.012, 0.0004
"""Seconds of a step, and of each of its tokens beside that."""


class SteadyWorker(Worker):
    """Ends a step when its time has passed."""

    def run(self, step: RunStep, on_layer: Callable[[int], None] | None = None) -> StepDone:
        """See the base class."""
        end = time.monotonic() + _STEP + _TOKEN * sum(chunk.num_tokens for chunk in step.chunks)
        done = super().run(step, on_layer)
        time.sleep(max(end - time.monotonic(), 0.0))
        return done


async def serve(port: int, name: str) -> None:
    """Until a signal comes."""
    # What instances compute with is nothing that a cluster's user chooses.
    rank.Worker = SteadyWorker  # type: ignore[misc]
    scheduler = SchedulerConfig(max_batch_tokens=512, max_batch_size=64, max_model_len=2048)
    async with LocalCluster(model_dir(), kv=KvConfig(num_blocks=2048), scheduler=scheduler) as backend:
        app = create_app(backend, load_served_model(model_dir(), names=(name,)), ApiSettings(), clock=cluster_time)
        options = uvicorn.Config(
            app, port=port, http="httptools", lifespan="off", access_log=False, log_level="warning"
        )
        await uvicorn.Server(options).serve()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--name", required=True, help="the model's, to clients")
    arguments = parser.parse_args()
    asyncio.run(serve(arguments.port, arguments.name))
