"""From the command's options to a complete plan, with every contradiction refused before a request is sent."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distserve.bench.arrivals import Gamma, TraceTimes
from distserve.bench.errors import WorkloadError
from distserve.bench.lengths import parse_lengths
from distserve.bench.metrics import SLO
from distserve.bench.target import Target
from distserve.bench.traces import Trace, read_trace
from distserve.bench.workload import WorkloadSpec

_DEFAULT_REQUESTS = 100
_DEFAULT_PROBE_SECONDS = 60.0
_PROBE_WARMUP_SHARE = 0.2
_DEFAULT_LENGTHS = ("256", "64")


@dataclass(frozen=True)
class Search:
    """Bounds of ``--find-goodput``."""

    start: float
    min_rate: float
    max_rate: float
    tolerance: float
    max_probes: int


@dataclass(frozen=True)
class Plan:
    """What to do, complete: where, with which load, how often.

    ``rates``: one run each (None: a trace's own times, or closed loop). ``clients``: closed loop with so many.
    ``warmup``: seconds of arrivals that are sent but not counted. ``vocab_size``: None asks the server.
    """

    target: Target
    workload: WorkloadSpec
    rates: tuple[float | None, ...]
    clients: int | None
    warmup: float
    timeout: float
    slo: SLO | None
    search: Search | None = None
    text_prompts: bool = False
    vocab_size: int | None = None


def make_plan(url: str, o: dict[str, Any]) -> Plan:
    """The plan that the options ``o`` (by the command's parameter names) ask for at ``url``.

    Raises WorkloadError, with the options at fault in the message.
    """
    if "://" not in url:
        url = f"http://{url}"
    target = Target(
        url.rstrip("/").removesuffix("/v1"),
        o["model"],
        chat=o["chat"],
        plain=o["plain"],
        return_timeline=o["return_timeline"],
        extra_body=_json_object(o["extra_body"]),
    )
    slo = _slo(o)
    trace = _read_trace(o)
    rates = _rates(o["rates"])
    arrivals = _arrivals(o, trace, rates)
    search = _search(o, rates) if o["find_goodput"] else None

    duration, num_requests = o["duration"], o["num_requests"]
    own_times = isinstance(arrivals, TraceTimes) and not rates and search is None
    if duration is None and search is not None:
        duration = _DEFAULT_PROBE_SECONDS
    if num_requests is None and not isinstance(arrivals, TraceTimes):
        if duration is None:
            num_requests = _DEFAULT_REQUESTS
        elif not math.isfinite(duration):
            raise WorkloadError(f"--duration {duration:g} has no end: give a number of seconds, or --num-requests")
    warmup = o["warmup"]
    if warmup is None:
        warmup = _PROBE_WARMUP_SHARE * duration if search is not None else 0.0
    if duration is not None and warmup >= duration:
        raise WorkloadError(f"--warmup {warmup:g} leaves nothing of --duration {duration:g} to measure")
    if o["time_scale"] != 1.0 and not own_times:
        raise WorkloadError("--time-scale stretches a trace's own times: it needs --trace and no --rate or --clients")

    has_trace = trace is not None
    prompt, output = (
        parse_lengths(given or default) if given or not has_trace else None
        for given, default in zip((o["prompt_len"], o["output_len"]), _DEFAULT_LENGTHS, strict=True)
    )
    spec = WorkloadSpec(
        arrivals=arrivals,
        prompt=prompt,
        output=output,
        trace=trace,
        num_requests=num_requests,
        duration=duration,
        time_scale=o["time_scale"],
        length_scale=o["length_scale"],
        fit_context=o["fit_context"],
        seed=o["seed"],
    )
    return Plan(
        target=target,
        workload=spec,
        rates=rates or (None,),
        clients=o["clients"],
        warmup=warmup,
        timeout=o["timeout"],
        slo=slo,
        search=search,
        text_prompts=o["prompt_text"] or o["chat"],
        vocab_size=o["vocab_size"],
    )


def _json_object(text: str | None) -> dict[str, Any]:
    if not text:
        return {}
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise WorkloadError(f"--extra-body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise WorkloadError("--extra-body must be a JSON object")
    return value


def _slo(o: dict[str, Any]) -> SLO | None:
    ttft, tpot = o["slo_ttft"], o["slo_tpot"]
    if ttft is None and tpot is None:
        if o["find_goodput"]:
            raise WorkloadError("--find-goodput needs --slo-ttft, --slo-tpot or both")
        return None
    return SLO(math.inf if ttft is None else ttft, math.inf if tpot is None else tpot, o["target_share"])


def _rates(text: str | None) -> tuple[float, ...]:
    if not text:
        return ()
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise WorkloadError(f"--rate {text!r}: give requests/s, or several separated by commas") from None
    if not all(0 < rate < math.inf for rate in rates):
        raise WorkloadError(f"--rate {text!r}: a rate must be positive")
    return rates


def _arrivals(o: dict[str, Any], trace: Trace | None, rates: tuple[float, ...]) -> Gamma | TraceTimes | None:
    kind, clients, cv = o["arrivals"], o["clients"], o["cv"]
    if clients is not None:
        if rates or kind or o["find_goodput"]:
            raise WorkloadError("--clients is closed loop: it takes no --rate, --arrivals or --find-goodput")
        return None
    if cv is not None and kind != "gamma":
        raise WorkloadError("--cv shapes gamma arrivals: give --arrivals gamma")
    timed = trace is not None and trace.timestamps is not None
    if kind is None:
        kind = "trace" if timed and not rates and not o["find_goodput"] else "poisson"
    if kind == "trace":
        if trace is None or trace.timestamps is None:
            raise WorkloadError("--arrivals trace needs a --trace with timestamps (azure or mooncake)")
        return TraceTimes(trace.timestamps)
    if not rates and not o["find_goodput"]:
        raise WorkloadError("say how much load: --rate R, --clients N, --find-goodput, or a --trace with timestamps")
    return Gamma(1.0 if cv is None else cv)


def _search(o: dict[str, Any], rates: tuple[float, ...]) -> Search:
    if len(rates) > 1:
        raise WorkloadError("--find-goodput starts at one --rate")
    if o["min_rate"] > o["max_rate"]:
        raise WorkloadError(f"--min-rate {o['min_rate']:g} is above --max-rate {o['max_rate']:g}")
    return Search(rates[0] if rates else 1.0, o["min_rate"], o["max_rate"], o["tolerance"], o["max_probes"])


def _read_trace(o: dict[str, Any]) -> Trace | None:
    path = o["trace_path"]
    if path is None:
        if o["trace_start"] or o["trace_end"] is not None:
            raise WorkloadError("--trace-start and --trace-end need a --trace")
        return None
    count = _token_counter(o["tokenizer"]) if o["tokenizer"] is not None else None
    trace = read_trace(path, o["trace_format"], count)
    if o["trace_start"] or o["trace_end"] is not None:
        trace = trace.window(o["trace_start"], o["trace_end"])
    return trace


def _token_counter(path: Path) -> Callable[[str], int]:
    try:
        # Optional: only ShareGPT texts are counted, and not everyone who measures has it.
        from tokenizers import Tokenizer
    except ImportError:
        raise WorkloadError("--tokenizer needs the package tokenizers: pip install tokenizers") from None
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001  the library raises nothing more specific
        raise WorkloadError(f"cannot read the tokenizer {file}: {error}") from None
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)
