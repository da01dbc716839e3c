"""What is measured of one server, each by one run of ``distserve bench``; lengths in tokens, times in seconds.

Nothing here knows which system it measures.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common.load import Document, LoadError, bench, summary
from benchmarks.common.servers import Server

SLO = {"slo_ttft": 1.0, "slo_tpot": 0.06, "attainment": 0.9}
OPEN_LOOP_LENGTHS = {
    "prompt_len": "lognormal:mean=300,sigma=0.8,max=1500",
    "output_len": "lognormal:mean=60,sigma=0.6,max=256",
}
DECODE_OUTPUTS = {1: 128, 8: 192, 32: 320}
"""Output tokens by batch size: so many that the last prompt is in long before the first answer ends."""
_LEAST_STEPS = 24
_ATTEMPTS = 3


@dataclass(frozen=True)
class Client:
    """How every server is asked: the vocabulary that ids are drawn from, where tables are logged, and how long."""

    vocab_size: int
    log: Path
    quick: bool = False

    def run(self, server: Server, seed: int, options: Mapping[str, object], *, may_miss: bool = False) -> Document:
        """One run against ``server``."""
        shared = {"vocab_size": self.vocab_size, "seed": seed}
        return bench(server.url, {**shared, **options}, log=self.log, may_miss=may_miss)

    def ttft(self, server: Server, seed: int, prompt_len: int) -> float:
        """Median TTFT of prompts sent one at a time."""
        options = {"clients": 1, "num_requests": 3 if self.quick else 8, "prompt_len": prompt_len, "output_len": 1}
        return float(summary(self.run(server, seed, options))["ttft"]["p50"])

    def prompt_throughput(self, server: Server, seed: int) -> float:
        """Prompt tokens/s of a stream that saturates: 8 clients, 1024 in, 1 out."""
        options = {"clients": 8, "num_requests": 16 if self.quick else 24, "prompt_len": 1024, "output_len": 1}
        return float(summary(self.run(server, seed, options))["prompt_token_throughput"])

    def decode_step(self, server: Server, seed: int, batch: int) -> float:
        """Seconds per decode step with ``batch`` sequences of 256 prompt tokens, none of which is in prefill."""
        options = {"clients": batch, "num_requests": batch, "prompt_len": 256, "output_len": DECODE_OUTPUTS[batch]}
        for attempt in range(_ATTEMPTS):
            # A prompt held up by a busy machine can miss the others' decoding altogether; other seeds, other prompts.
            step = steady_step(self.run(server, seed + 100 * attempt, {**options, "token_times": True}))
            if step is not None:
                return step
        raise LoadError(f"{server.name}: {batch} requests never decoded together for {_LEAST_STEPS} steps")

    def closed_loop(self, server: Server, seed: int, clients: int, per_client: int | None = None) -> dict[str, float]:
        """Output tokens/s and median TPOT of ``clients`` that each wait for their answer, 256 in, 64 out.

        ``per_client`` requests of each; None: six, or two of more than eight clients.
        """
        each = per_client or (2 if clients > 8 else 6)
        num = clients * (2 if self.quick else each)
        options = {"clients": clients, "num_requests": num, "prompt_len": 256, "output_len": 64}
        figures = summary(self.run(server, seed, options))
        return {"output_tokens_per_second": figures["output_token_throughput"], "tpot": figures["tpot"]["p50"]}

    def goodput(self, server: Server, seed: int, start: float) -> dict[str, Any]:
        """The bracket that a search from ``start`` requests/s ends with."""
        options = {
            "find_goodput": True,
            "rate": start,
            "min_rate": 0.1,
            "duration": 10 if self.quick else 30,
            "tolerance": 0.15,
            "max_probes": 2 if self.quick else 4,
            **OPEN_LOOP_LENGTHS,
            **SLO,
        }
        found = self.run(server, seed, options, may_miss=True)["goodput"]
        kept = ("rate", "passed", "attainment", "verdict")
        return {
            "low": found["low"],
            "high": found["high"],
            "reason": found["reason"],
            "probes": [{name: probe[name] for name in kept} for probe in found["probes"]],
        }

    def open_loop(self, server: Server, seed: int, rate: float) -> dict[str, Any]:
        """Attainment and latencies at ``rate`` requests/s, Poisson."""
        duration = 10 if self.quick else 30
        options = {"rate": rate, "duration": duration, "warmup": duration / 5, **OPEN_LOOP_LENGTHS, **SLO}
        figures = summary(self.run(server, seed, options, may_miss=True))
        return {
            "rate": rate,
            "attainment": figures["attainment"]["both"],
            "ttft_attainment": figures["attainment"]["ttft"],
            "tpot_attainment": figures["attainment"]["tpot"],
            "num_offered": figures["num_offered"],
            "num_ok": figures["num_ok"],
            "ttft_p90": figures["ttft"]["p90"],
            "tpot_p90": figures["tpot"]["p90"],
        }


def steady_step(document: Document) -> float | None:
    """Seconds per token while every request of a run was decoding; None if that was too short to say.

    The window opens when the last request has its first token and closes when the first request has its last: within
    it the batch is whole and no prompt is computed. The median over requests of their mean gap.
    """
    requests = document["runs"][0]["requests"]
    begin = max(request["event_times"][0] for request in requests)
    end = min(request["event_times"][-1] for request in requests)
    gaps: list[float] = []
    for request in requests:
        events = zip(request["event_times"], request["event_tokens"], strict=True)
        inside = [(time, num) for time, num in events if begin <= time <= end]
        # The first event's tokens came before the span that is divided.
        num_tokens = sum(num for _, num in inside[1:])
        if num_tokens < _LEAST_STEPS:
            return None
        gaps.append((inside[-1][0] - inside[0][0]) / num_tokens)
    return median(gaps)
