"""Published times of whole steps, in one form: groups of one model, card and tensor-parallel degree under one engine.

A group is what is held out of a fit, never single rows of it. The sources:

- DistServe's fits for OPT-13B and OPT-66B on the A100, of its own engine (SwiftTransformer) and of the vLLM of 2023,
  evaluated over prompts and batches that fit in memory;
- Splitwise's measurements of Llama-2-70B and BLOOM-176B on A100 and H100 (vLLM of 2023);
- LLMServingSim's layer profiles summed to steps: Llama-3.1-8B under vLLM 0.19 on RTX 4090 and RTX PRO 6000,
  Llama-3.1-70B on H100 with unfused norms and rotary embedding. Sums of kernels: no host, no collectives.
"""

import importlib.util
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.latency_models.operators import (
    A100,
    B200,
    H100,
    H200,
    L40S,
    LAYERS,
    PROFILES,
    RTX4090,
    RTXPRO6000,
    read_csv,
)
from distserve.core.config import ParallelConfig
from distserve.core.latency import StepShape
from distserve.core.topology import ClusterSpec
from simulator.latency.aiconfigurator import AiconfiguratorModel
from simulator.latency.analytic import AnalyticModel
from simulator.latency.distserve_profile import DistServeProfile
from simulator.latency.efficiency import Efficiency, Engine
from simulator.latency.gpus import GpuSpec
from simulator.latency.kernels import Array
from simulator.latency.shape import ModelShape

OPT_13B = ModelShape("opt-13b", 40, 5120, 40, 40, 128, 20480, 50272, False, True, 2050)
OPT_66B = ModelShape("opt-66b", 64, 9216, 72, 72, 128, 36864, 50272, False, True, 2050)
LLAMA2_70B = ModelShape("llama2-70b", 80, 8192, 64, 8, 128, 28672, 32000)
BLOOM_176B = ModelShape("bloom-176b", 70, 14336, 112, 112, 128, 57344, 250880, False, True)
LLAMA31_8B = ModelShape("llama-3.1-8b", 32, 4096, 32, 8, 128, 14336, 128256)
LLAMA31_70B = ModelShape("llama-3.1-70b", 80, 8192, 64, 8, 128, 28672, 128256)
_MOST = 160
# One core of Splitwise's H100 machine (Azure ND H100 v5: Xeon 8480C, up to 3.8 GHz) beside one of its A100 machine
# (ND A100 v4: EPYC 7V12, Zen 2, up to 3.3 GHz). Instructions per clock: Intel claims 18% from Skylake to Sunny Cove and
# 19% from there to Golden Cove; Zen 2 is taken to equal Skylake. From data sheets, not from the step times.
_H100_HOST = 3.8 / 3.3 * 1.18 * 1.19


@dataclass(frozen=True, slots=True)
class Group:
    """Steps of one model on one card with one tensor-parallel degree under one engine.

    ``host``: how fast one core of its machine is, beside that of the engine's first. ``collectives`` False: the times
    are sums of kernels without the shards' all-reduces. ``tables`` begins the names of the operators' tables that the
    sums are made of, if coefficients are fitted to those.
    """

    engine: str
    gpu: GpuSpec
    model: ModelShape
    tp: int
    steps: tuple[StepShape, ...]
    seconds: Array
    host: float = 1.0
    collectives: bool = True
    tables: str = "none"

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.engine}: {self.model.name} on {self.gpu.name} tp{self.tp}"

    def predict(self, efficiency: Efficiency, engine: Engine) -> Array:
        """The analytic model's seconds of every step."""
        if not self.collectives:
            efficiency = replace(
                efficiency, all_reduce_bandwidth=1e9, all_reduce_latency=1e-12, all_reduce_hop=0.0, all_reduce_large=0.0
            )
        cluster = ClusterSpec(self.gpu.name, 1, 8, self.gpu.link_bandwidth, 25e9)
        model = AnalyticModel(self.model, cluster, engine=engine.on_host(self.host), efficiency=efficiency)
        return model.seconds(ParallelConfig(self.tp), self.steps)


def load_groups() -> list[Group]:
    """All groups."""
    return [*_distserve("distserve"), *_distserve("vllm"), *_splitwise(), *_layer_sums(), *_eager_sums()]


def prompts(length: int, count: int = 1, past: int = 0) -> StepShape:
    """A step of ``count`` prompts (or chunks behind ``past`` tokens) of ``length`` tokens each."""
    pairs = count * (length * past + length * (length + 1) // 2)
    return StepShape(num_prefill_tokens=count * length, prefill_pairs=pairs, num_prefills=count)


def decodes(count: int, context: int) -> StepShape:
    """A step of ``count`` decodes over ``context`` tokens each."""
    return StepShape(num_decodes=count, decode_context=count * context)


def _distserve(engine: str) -> Iterator[Group]:
    path = PROFILES / "distserve" / f"profiler-a100-80g.{engine}.json"
    room = {
        (row["model"].split("/")[1], int(row["tp"])): int(row["max_num_tokens"])
        for row in read_csv(PROFILES / "distserve" / "max_num_tokens.csv")
        if row["pp"] == "1"
    }
    prefills = [prompts(length, count) for length in (64, 128, 256, 512, 1024, 2000) for count in (1, 2, 4)]
    batches = [decodes(count, context) for count in (1, 4, 16, 32, 64, 128, 192) for context in (128, 256, 512, 1024)]
    for model in (OPT_13B, OPT_66B):
        profile = DistServeProfile.load(path, model.name)
        for tp in sorted(profile.fits):
            steps = [
                step for step in (*prefills, *batches)
                if step.num_prefill_tokens <= 4096 and step.decode_context <= room[model.name, tp]
            ]  # fmt: skip
            time = profile.step_time(ParallelConfig(tp))
            seconds = np.array([time.seconds(step) for step in steps])
            name = "SwiftTransformer" if engine == "distserve" else "vLLM 2023 (DistServe)"
            yield Group(name, A100, model, tp, tuple(steps), seconds)


def _splitwise() -> Iterator[Group]:
    measured: dict[tuple[str, str, int], dict[tuple[int, int, int], list[tuple[float, float]]]]
    measured = defaultdict(lambda: defaultdict(list))
    for row in read_csv(PROFILES / "splitwise" / "perf_model.csv"):
        key = (row["model"], row["hardware"], int(row["tensor_parallel"]))
        work = (int(row["prompt_size"]), int(row["batch_size"]), int(row["token_size"]))
        measured[key][work].append((float(row["prompt_time"]), float(row["token_time"])))
    for (model, hardware, tp), rows in measured.items():
        if hardware.endswith("pcap"):  # power capped
            continue
        steps, seconds = [], []
        for (length, count, output), times in rows.items():
            if tp == 2 and count == 64:  # does not fit in memory: the times are of something else
                continue
            prompt, token = (statistics.median(column) / 1e3 for column in zip(*times, strict=True))
            if output == 128:
                steps.append(prompts(length, count))
                seconds.append(prompt)
            steps.append(decodes(count, length + output // 2))
            seconds.append(token)
        gpu = A100 if hardware.startswith("a100") else H100
        shape = LLAMA2_70B if model == "llama2-70b" else BLOOM_176B
        host = _H100_HOST if gpu is H100 else 1.0
        yield Group("vLLM 2023 (Splitwise)", gpu, shape, tp, tuple(steps), np.array(seconds), host)


def _layer_sums() -> Iterator[Group]:
    for card, gpu, degrees in (("RTX4090", RTX4090, (1,)), ("RTXPRO6000", RTXPRO6000, (1, 2))):
        for tp in degrees:
            folder = LAYERS / card / "Llama-3.1-8B" / "profile" / f"tp{tp}"
            by_tokens = _columns(folder / "dense.csv", "layer", "tokens", "time_us")
            by_rows = _columns(folder / "per_sequence.csv", "layer", "sequences", "time_us")
            steps, seconds = [], []
            layer = ("qkv_proj", "rotary_emb", "o_proj", "gate_up_proj", "act_fn", "down_proj")
            rows = read_csv(folder / "attention.csv")
            for row in _some(rows):
                chunk, past, count, context = (
                    int(row[column]) for column in ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
                )
                prefill = prompts(chunk, 1 if chunk else 0, past)
                steps.append(replace(prefill, num_decodes=count, decode_context=count * context))
                tokens, sampled = chunk + count, count + bool(chunk)
                one = sum(_at(by_tokens[name], tokens) for name in layer) + 2 * _at(by_tokens["layernorm"], tokens)
                total = 32 * (one + float(row["time_us"]))
                total += _at(by_tokens["embedding"], tokens) + _at(by_tokens["final_layernorm"], tokens)
                total += _at(by_rows["lm_head"], sampled) + _at(by_rows["sampler"], sampled)
                seconds.append(total / 1e6)
            name = f"LLMServingSim {card} tp{tp}"
            times = np.array(seconds)
            yield Group("vLLM 0.19 kernels", gpu, LLAMA31_8B, tp, tuple(steps), times, collectives=False, tables=name)


def _eager_sums() -> Iterator[Group]:
    attention = ("input_layernorm", "q_proj", "k_proj", "v_proj", "rope", "o_proj")
    layer = (*attention, "post_layernorm", "gate_proj", "up_proj", "act_fn", "down_proj")
    for tp in (1, 2, 4):
        folder = PROFILES / "llmservingsim_v0" / "H100_Llama-3.1-70B" / f"tp{tp}"
        by_tokens = _columns(folder / "layers.csv", "layer_name", "input", "latency(ns)")

        def step_seconds(tokens: int, sampled: int, attention: float, table: dict[str, Array] = by_tokens) -> float:
            one = sum(_at(table[name], tokens) for name in layer) + attention
            ends = (
                _at(table["embedding"], tokens) + _at(table["final_layernorm"], tokens) + _at(table["lm_head"], sampled)
            )
            return (80 * one + ends) / 1e9

        steps = [prompts(length) for length in (1, 8, 32, 64, 100, 128, 200, 256, 400, 512, 700, 1024, 1500, 2048)]
        seconds = [
            step_seconds(step.num_prefill_tokens, 1, _at(by_tokens["attn"], step.num_prefill_tokens)) for step in steps
        ]
        if tp == 4:
            rows = [row for row in read_csv(folder / "attention.csv") if row["is_prefill"] == "False"]
            # Large batches of long contexts took less time than reading their cache at the data sheet's bandwidth
            # takes: the profiler's block tables must have named the same blocks over and over.
            token_bytes = LLAMA31_70B.kv_bytes_per_token(ParallelConfig(tp)) / LLAMA31_70B.num_layers
            fastest = H100.memory_bandwidth / token_bytes * 1e-3
            rows = [
                row
                for row in rows
                if int(row["batch_size"]) * int(row["kv_cache_size"])
                < fastest * float(row["time_stats.attn_decode.median"])
            ]
            for row in _some(rows):
                count, context = int(row["batch_size"]), int(row["kv_cache_size"])
                steps.append(decodes(count, context))
                seconds.append(step_seconds(count, count, float(row["time_stats.attn_decode.median"]) * 1e6))
        yield Group("unfused kernels", H100, LLAMA31_70B, tp, tuple(steps), np.array(seconds), collectives=False)


def load_composed() -> Iterator[Group]:
    """Steps that aiconfigurator-core composes of kernels measured on six cards; none without the package."""
    package = importlib.util.find_spec("aiconfigurator_core")
    if package is None or package.origin is None:
        return
    configs = Path(package.origin).parent / "model_configs"
    steps = (
        *(prompts(length) for length in (128, 512, 1024, 2048, 4096, 8192)),
        *(decodes(count, context) for count in (1, 8, 32, 128) for context in (512, 2048, 4096)),
    )
    for name in (
        "meta-llama/Meta-Llama-3.1-8B",
        "meta-llama/Meta-Llama-3.1-70B",
        "Qwen/Qwen3-32B",
        "Qwen/Qwen3-30B-A3B",
    ):
        shape = replace(ModelShape.load(configs / f"{name.replace('/', '--')}_config.json"), name=name.split("/")[1])
        for gpu in (A100, H100, H200, B200, L40S, RTXPRO6000):
            source = AiconfiguratorModel(name, shape, ClusterSpec(gpu.name, 1, 8, gpu.link_bandwidth, 25e9))
            for tp in (1, 4):
                time = source.step_time(ParallelConfig(tp))
                seconds = np.array([time.seconds(step) for step in steps])
                yield Group("composed", gpu, shape, tp, steps, seconds)


def _some(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [rows[index] for index in sorted(np.random.default_rng(0).permutation(len(rows))[:_MOST])]


def _columns(path: Path, layer: str, count: str, time: str) -> dict[str, Array]:
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in read_csv(path):
        found[row[layer]].append((float(row[count]), float(row[time])))
    return {name: np.array(sorted(points)).T for name, points in found.items()}


def _at(points: Array, count: float) -> float:
    return float(np.interp(count, points[0], points[1]))
