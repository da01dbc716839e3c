"""A measured run of vLLM, and its replay on a simulated mixed instance with that engine's settings.

The files are those of LLMServingSim's examples: ``vllm/requests.jsonl`` (when each request arrived and when the engine
had its first and last token), ``vllm/meta.json`` (the engine's settings), ``profile/tp1`` (times of the same card's
layers, one by one) and ``validation/summary.txt`` (how far that simulator's replay was off). ``prefixes.csv`` beside
this module says which prompts begin like an earlier one: both runs were offered the same requests.
"""

import csv
import json
from dataclasses import dataclass, fields, replace
from itertools import count, islice
from pathlib import Path

import numpy as np

from distserve.bench.workload import Workload
from distserve.core.config import InstanceSpec, KvConfig, ParallelConfig, Role, SchedulerConfig
from distserve.core.latency import StepShape, StepTime
from distserve.core.router import RouterConfig
from simulator.latency.gpus import find_gpu
from simulator.latency.layer_profile import EngineCosts, LayerProfile
from simulator.latency.memory import kv_config
from simulator.latency.shape import ModelShape
from simulator.model import ClusterModel, Delays, InstanceModel
from simulator.results import Counts, Floats, Simulation
from simulator.simulation import simulate

LLAMA_8B = ModelShape(
    name="Llama-3.1-8B",
    num_layers=32,
    hidden=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate=14336,
    vocab=128256,
)

KERNELS_ALONE = EngineCosts(graph_sizes=(1, 2, 4, *range(8, 257, 8), *range(272, 513, 16)))
"""Nothing but what was measured of the kernels. The sizes are vLLM's (``cudagraph_capture_sizes``)."""

PREFIXES = Path(__file__).parent / "prefixes.csv"


@dataclass(frozen=True, slots=True)
class Card:
    """A card and how the run on it differs from the sum of its kernels; the constants are fitted, see README.md.

    ``gpu`` is its name in the GPU table. ``cold_start`` is how long the engine's first step took beyond what such a
    step takes later, in seconds, as the run shows it.
    """

    name: str
    gpu: str
    per_step: float
    unequal_contexts: float
    cold_start: float = 0.0

    @property
    def costs(self) -> EngineCosts:
        """The engine around the kernels."""
        return replace(KERNELS_ALONE, per_step=self.per_step, unequal_contexts=self.unequal_contexts)


@dataclass(frozen=True)
class Run:
    """A measured run. Times in seconds, one entry per request in order of arrival, on the engine's clock."""

    card: Card
    directory: Path
    prompt_lens: Counts
    output_lens: Counts
    arrival: Floats
    first_token: Floats
    finish: Floats
    max_num_seqs: int
    max_batch_tokens: int
    kv: KvConfig

    @property
    def ttft(self) -> Floats:
        """Seconds from arrival to first token."""
        return self.first_token - self.arrival

    @property
    def tpot(self) -> Floats:
        """Seconds per token after the first."""
        return (self.finish - self.first_token) / (self.output_lens - 1)

    @property
    def latency(self) -> Floats:
        """Seconds from arrival to last token."""
        return self.finish - self.arrival


def read_run(directory: Path, card: Card) -> Run:
    """Read a run of Llama-3.1-8B on one ``card``.

    Arrivals were stamped by the wall clock, tokens by the engine's own. The offset between the two is taken from the
    request that the engine took up soonest after its arrival.
    """
    lines = (directory / "vllm" / "requests.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    arrival, queued, first, last = (
        np.array([row[name] for row in rows])
        for name in ("arrival_time", "queued_ts", "first_token_ts", "last_token_ts")
    )
    arrival += (queued - arrival).min()
    start = arrival[0]
    meta = json.loads((directory / "vllm" / "meta.json").read_text(encoding="utf-8"))
    settings = meta["engine_kwargs"]
    return Run(
        card=card,
        directory=directory,
        prompt_lens=np.array([row["input_toks"] for row in rows]),
        output_lens=np.array([row["output_toks"] for row in rows]),
        arrival=arrival - start,
        first_token=first - start,
        finish=last - start,
        max_num_seqs=settings["max_num_seqs"],
        max_batch_tokens=settings["max_num_batched_tokens"],
        kv=_memory(meta, card.gpu, settings["max_num_batched_tokens"]),
    )


def _memory(meta: dict[str, dict[str, int]], gpu: str, max_batch_tokens: int) -> KvConfig:
    """The blocks vLLM says it has, but for the one it never hands out; where it says nothing, those of the card."""
    said = meta.get("kv_cache")
    if said is not None:
        return KvConfig(said["num_gpu_blocks"] - 1, said["block_size"])
    memory = kv_config(LLAMA_8B, find_gpu(gpu), ParallelConfig(), max_batch_tokens=max_batch_tokens)
    assert memory is not None, "the run shows that the model fits"
    return memory


class _FirstStep:
    """Step times of which the first is given."""

    def __init__(self, seconds: float, later: StepTime) -> None:
        self._first: float | None = seconds
        self._later = later

    def seconds(self, shape: StepShape) -> float:
        """See :class:`distserve.core.latency.StepTime`."""
        first, self._first = self._first, None
        return self._later.seconds(shape) if first is None else first

    def handover(self, shape: StepShape) -> float:
        """See :class:`distserve.core.latency.StepTime`."""
        return self._later.handover(shape)


def deployment(run: Run, costs: EngineCosts) -> ClusterModel:
    """One mixed instance as vLLM was set up.

    vLLM starts a step before the tokens of the one before it are known (``async_scheduling``): lookahead. It admits a
    prompt when all of it fits (``scheduler_reserve_full_isl``) and keeps no memory free beside: no headroom.
    """
    config = SchedulerConfig(
        max_batch_tokens=run.max_batch_tokens,
        max_batch_size=run.max_num_seqs,
        max_in_flight=2,
        lookahead=True,
        headroom=0.0,
        max_model_len=32768,
        prefix_caching=True,
    )
    profile = LayerProfile(run.directory / "profile" / "tp1", run.card.name, LLAMA_8B.num_layers, costs)
    spec = InstanceSpec("vllm", Role.MIXED, run.kv, config)
    step_time = _FirstStep(run.card.cold_start, profile.step_time(spec.parallel))
    return ClusterModel(
        (InstanceModel(spec, step_time),),
        # Times are taken at the engine. It sheds nothing, however long the queue.
        delays=Delays(message=0.0),
        router=RouterConfig(max_wait=float("inf")),
    )


def replay(run: Run, costs: EngineCosts | None = None) -> Simulation:
    """Offer the run's requests, at their times, to the simulated instance, by default with the card's ``costs``.

    A request of one token goes before them, whose step is the cold start: until that is over the engine launches
    nothing else.
    """
    size = run.kv.block_size
    workload = Workload(
        np.concatenate(([1], run.prompt_lens)),
        np.concatenate(([1], run.output_lens)),
        np.concatenate(([0.0], run.arrival)),
        prefix_blocks=((), *block_keys(run.prompt_lens.tolist(), size)),
        tokens_per_block=size,
    )
    simulation = simulate(deployment(run, costs or run.card.costs), workload)
    lines = simulation.timelines
    columns = {field.name: getattr(lines, field.name)[1:] for field in fields(lines)}
    return replace(simulation, timelines=replace(lines, **columns))


def block_keys(prompt_lens: list[int], block_size: int) -> tuple[tuple[int, ...], ...]:
    """Keys of the prompts' full blocks: those of an earlier prompt as far as ``PREFIXES`` has it, then new ones."""
    with PREFIXES.open(encoding="utf-8", newline="") as file:
        shares = {
            int(row["request"]): (int(row["shares_with"]), int(row["shared_tokens"])) for row in csv.DictReader(file)
        }
    fresh = count()
    keys: list[tuple[int, ...]] = []
    for index, length in enumerate(prompt_lens):
        other, num_tokens = shares.get(index, (index, 0))
        shared = keys[other][: num_tokens // block_size] if num_tokens else ()
        keys.append((*shared, *islice(fresh, length // block_size - len(shared))))
    return tuple(keys)
