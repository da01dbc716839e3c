"""One mixed replica against two on this machine: ``distserve serve --mixed 1`` and ``--mixed 2``, one thread each.

Both servers live during the whole run and are asked in turns, so a ratio is of neighbouring minutes; the one that is
not asked does next to nothing. The client, the API process and the router run on the same cores as the replicas.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common.load import bench, summary
from benchmarks.common.servers import Server, free_port, running

LENGTHS = {
    "prompt_len": "lognormal:mean=256,sigma=1.0,max=1500",
    "output_len": "lognormal:mean=64,sigma=0.8,max=300",
}
_DISTSERVE = Path(sys.executable).with_name("distserve")


def measure(
    model: Path,
    clients: tuple[int, ...],
    rounds: int,
    per_client: int,
    folder: Path,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Per number of clients: tokens out per second of both, of every round, and the medians' ratio."""
    rows = []
    with ExitStack() as stack:
        servers = {}
        for count in (1, 2):
            port = free_port()
            command = [_DISTSERVE, "serve", model, "--mixed", count, "--threads", 1, "--dtype", "bfloat16"]
            command += ["--port", port, "--max-batch-size", 32]
            say(f"starting {count} replica{'s' if count > 1 else ''}")
            log = folder / f"serve-{count}.log"
            url = f"http://127.0.0.1:{port}"
            servers[count] = stack.enter_context(running(f"mixed x{count}", list(map(str, command)), url, log))
        for num_clients in clients:
            figures: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
            for number in range(rounds):
                for count in (1, 2):
                    found = _closed_loop(servers[count], num_clients, per_client, number, folder)
                    say(f"{num_clients} clients, {count} replicas: {found['output_token_throughput']:.0f} tokens/s")
                    figures[count].append(found)
            rows.append({"clients": num_clients, **_compare(figures)})
    return rows


def _closed_loop(server: Server, num_clients: int, per_client: int, seed: int, folder: Path) -> dict[str, Any]:
    options = {"clients": num_clients, "num_requests": num_clients * per_client, "seed": seed, **LENGTHS}
    return summary(bench(server.url, options, log=folder / "bench.log"))


def _compare(figures: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over rounds, and what two replicas have more of than one."""

    def of(count: int, *path: str) -> float:
        values = []
        for found in figures[count]:
            value: Any = found
            for name in path:
                value = value[name]
            values.append(float(value))
        return median(values)

    one, two = of(1, "output_token_throughput"), of(2, "output_token_throughput")
    return {
        "tokens_per_second": {"1": one, "2": two},
        "ratio": two / one,
        "ttft_p50": {str(count): of(count, "ttft", "p50") for count in (1, 2)},
        "tpot_p50": {str(count): of(count, "tpot", "p50") for count in (1, 2)},
        "rounds": {str(count): [found["output_token_throughput"] for found in figures[count]] for count in (1, 2)},
    }
