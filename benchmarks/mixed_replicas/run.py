"""Mixed replicas behind the router: how they scale in simulation, and two against one on this machine.

    python -m benchmarks.mixed_replicas.run simulated                  # about 2 minutes of one core
    python -m benchmarks.mixed_replicas.run measured --model MODEL     # about 5 minutes of two cores

Each part is written beside the other's latest result. MODEL is what ``python benchmarks/make_model.py MODEL`` writes.
Measure with nothing else running.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.common.machine import describe_run
from benchmarks.common.servers import unwind_on_sigterm
from benchmarks.mixed_replicas.measured import measure
from benchmarks.mixed_replicas.simulated import (
    BUSY,
    even,
    idle_beside_queue,
    kept_up_rate,
    latencies,
    load_within,
    quantile,
    replicas,
    round_robin,
    skewed,
)
from simulator.simulation import simulate

COUNTS = (2, 4, 8, 16)
SKEWED_RATES = (8, 12, 16, 20)
SKEWED_REPLICAS = 8


def scaling(num_requests: int) -> dict[str, Any]:
    """The load of many replicas at the latency of one; ``num_requests`` for each replica."""
    rate = BUSY * kept_up_rate(num_requests)
    one = latencies(simulate(replicas(1), even(rate, 4 * num_requests)).timelines)
    rows = []
    for count in COUNTS:
        say(f"simulating {count} replicas")
        load = load_within(count, one, rate, num_requests)
        found = latencies(simulate(replicas(count), even(load, num_requests * count)).timelines)
        rows.append({"replicas": count, "rate": load, "times": load / rate, **asdict(found)})
    return {"rate": rate, "one": asdict(one), "rows": rows}


def balance(num_requests: int) -> list[dict[str, Any]]:
    """Skewed lengths on eight replicas: by predicted wait, and every eighth request to each."""
    rows = []
    for rate in SKEWED_RATES:
        say(f"simulating skewed lengths at {rate} requests/s")
        workload = skewed(rate, num_requests)
        routed = [simulate(replicas(SKEWED_REPLICAS), workload).timelines]
        blind = round_robin(workload, SKEWED_REPLICAS)
        for name, runs in (("predicted wait", routed), ("round-robin", blind)):
            rows.append(
                {
                    "rate": rate,
                    "by": name,
                    "idle_beside_queue": idle_beside_queue(runs, SKEWED_REPLICAS),
                    "ttft_p50": quantile(runs, 0.5),
                    "ttft_p95": quantile(runs, 0.95),
                    "ttft_p99": quantile(runs, 0.99),
                }
            )
    return rows


def report(result: dict[str, Any]) -> str:
    """The tables."""
    parts = {"simulated": _simulated, "measured": _measured}
    lines = ["# Mixed replicas"]
    for name, write in parts.items():
        if name in result:
            lines += write(result[name])
    return "\n".join([*lines, ""])


def _simulated(part: dict[str, Any]) -> list[str]:
    facts, scale = part["facts"], part["scaling"]
    one = scale["one"]
    lines = [
        "",
        "## Load at equal latency, simulated",
        "",
        f"{facts['date'][:10]}; `{facts['command']}`.",
        "Llama-2-70B on 4 A100 a replica, SplitFuse with 768 tokens a step, 2600 +- 780 tokens in, 60 +- 18 out.",
        f"One replica has {scale['rate']:.2f} requests/s, {BUSY:.0%} of what it can just keep up with. Many have as",
        "many as they can without mean or P95 of TTFT or latency above the one's.",
        "",
        "| replicas | requests/s | times one replica's | TTFT mean | P95 | latency mean | P95 |",
        "|---|---|---|---|---|---|---|",
        f"| 1 | {scale['rate']:.2f} | 1 | {_seconds(one)} |",
    ]
    lines += [
        f"| {row['replicas']} | {row['rate']:.2f} | **{row['times']:.2f}** | {_seconds(row)} |" for row in scale["rows"]
    ]
    lines += [
        "",
        f"## Skewed lengths on {SKEWED_REPLICAS} replicas, simulated",
        "",
        "Lognormal prompts of mean 1200 (sigma 1.5, up to 12,000), outputs of mean 20 (sigma 1.2). The third column is",
        "the share of time in which a prompt waits longer than a step on one replica while another has nothing to do.",
        "",
        "| requests/s | given by | idle beside a queue | TTFT P50 | P95 | P99 |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['rate']} | {row['by']} | {row['idle_beside_queue']:.2%} | {row['ttft_p50']:.2f} s "
        f"| {row['ttft_p95']:.2f} s | {row['ttft_p99']:.2f} s |"
        for row in part["balance"]
    ]
    return lines


def _measured(part: dict[str, Any]) -> list[str]:
    facts = part["facts"]
    lines = [
        "",
        "## Two replicas against one, measured",
        "",
        f"{facts['date'][:10]}, {facts['num_cpus']} x {facts['cpu']}; `{facts['command']}`.",
        "",
        "`distserve serve --mixed 1` and `--mixed 2`, one thread each, bfloat16, in turns, closed loop, medians of",
        f"{part['rounds']} rounds. Client, API process and router share the cores with the replicas. Load average of",
        f"the machine before: {facts['load_average_at_start']}, after: {part['load_average_at_end']}.",
        "",
        "| clients | one, tokens/s | two, tokens/s | ratio | TTFT P50, one / two | TPOT P50, one / two |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['clients']} | {row['tokens_per_second']['1']:.0f} | {row['tokens_per_second']['2']:.0f} "
        f"| **{row['ratio']:.2f}** | {_pair(row['ttft_p50'])} | {_pair(row['tpot_p50'])} |"
        for row in part["rows"]
    ]
    return lines


def _seconds(row: dict[str, float]) -> str:
    return " | ".join(f"{row[name]:.2f} s" for name in ("ttft", "ttft_p95", "latency", "latency_p95"))


def _pair(seconds: dict[str, float]) -> str:
    return f"{seconds['1'] * 1e3:.0f} / {seconds['2'] * 1e3:.0f} ms"


def say(what: str) -> None:
    """Progress."""
    print(what, file=sys.stderr, flush=True)


def main() -> None:
    """Run the parts and write the report."""
    unwind_on_sigterm()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("simulated", "measured"))
    parser.add_argument("--model", type=Path, help="model directory of the servers")
    parser.add_argument("--quick", action="store_true", help="to rehearse")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    quick = options.quick
    part: dict[str, Any] = {"facts": describe_run("benchmarks.mixed_replicas.run")}
    if options.part == "simulated":
        part["scaling"] = scaling(60 if quick else 400)
        part["balance"] = balance(300 if quick else 3000)
    else:
        if options.model is None:
            parser.error("measured needs --model")
        part["rounds"] = 1 if quick else 3
        clients = (2, 8) if quick else (2, 8, 32)
        with TemporaryDirectory() as folder:
            part["rows"] = measure(options.model, clients, part["rounds"], 2 if quick else 4, Path(folder), say)
        part["load_average_at_end"] = round(os.getloadavg()[0], 2)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    file = options.output_dir / "result.json"
    result = json.loads(file.read_text()) if file.exists() else {}
    result[options.part] = part
    file.write_text(json.dumps(result, indent=1) + "\n")
    text = report(result)
    (options.output_dir / "report.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
