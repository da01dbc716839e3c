"""``distserve plan --explain-latency``: which step is meant, and the operations it is made of."""

from rich.console import Console

from distserve.core.config import ParallelConfig
from distserve.core.errors import ConfigError
from distserve.core.latency import StepShape
from placement.offered import Offered
from placement.problem import Problem
from placement.shapes import parallel_configs
from simulator.latency.analytic import AnalyticModel
from simulator.latency.explain import explain

_KEYS = ("tp", "pp", "prefill", "decode", "context")
_BATCH = 32


def print_explanation(console: Console, problem: Problem, text: str) -> None:
    """Print the operations of the steps that ``text`` names (see :func:`parse_step`).

    Raises ConfigError for a shape that makes no sense or cannot be, and for step times that were measured as wholes.
    """
    latency = problem.latency
    if not isinstance(latency, AnalyticModel):
        raise ConfigError(
            f"only the analytic model knows a step's operations; {latency.source} has whole steps. "
            "Give --latency analytic"
        )
    parallel, steps = parse_step(problem, text)
    explain(latency, parallel, steps, console)


def parse_step(problem: Problem, text: str) -> tuple[ParallelConfig, tuple[StepShape, ...]]:
    """The shape of an instance and the steps that ``text`` means.

    ``tp=2,pp=1,prefill=2048`` is one prompt of 2048 tokens, ``decode=32,context=900`` 32 sequences of 900 cached tokens
    each; both together are one step of a mixed instance. Without either: a prompt and a decode batch of the workload's
    mean lengths. Without tp and pp: the fewest GPUs whose memory holds the model.

    Raises ConfigError with what would be valid.
    """
    given: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        if key not in _KEYS or not (value.isascii() and value.isdigit() and int(value) >= 1):
            raise ConfigError(
                f"--explain-latency {text!r}: {part!r} is not one of {', '.join(f'{key}=N' for key in _KEYS)}"
            )
        given[key] = int(value)
    prompts, outputs = Offered(problem.workload, problem.search.seed).sample
    context = given.get("context", int(prompts.mean() + outputs.mean() / 2))
    prompt = given.get("prefill", int(prompts.mean()))
    prefill = StepShape(num_prefill_tokens=prompt, prefill_pairs=prompt * (prompt + 1) // 2, num_prefills=1)
    num_decodes = given.get("decode", _BATCH)
    decode = StepShape(num_decodes=num_decodes, decode_context=num_decodes * context)
    parallel = _smallest(problem)
    parallel = ParallelConfig(given.get("tp", parallel.tp), given.get("pp", 1 if "tp" in given else parallel.pp))
    if "prefill" in given and "decode" in given:
        both = StepShape(prompt, prefill.prefill_pairs, num_decodes, decode.decode_context, 1)
        return parallel, (both,)
    if "prefill" in given:
        return parallel, (prefill,)
    if "decode" in given or "context" in given:
        return parallel, (decode,)
    return parallel, (prefill, decode)


def _smallest(problem: Problem) -> ParallelConfig:
    """The fewest GPUs that hold the model; one GPU if none does, whose times can be told all the same."""
    for parallel in parallel_configs(problem):
        try:
            problem.model.check(parallel)
        except ConfigError:
            continue  # this split is not possible; a wider one may be
        if problem.kv(parallel, problem.limits.max_batch_size) is not None:
            return parallel
    return ParallelConfig()
