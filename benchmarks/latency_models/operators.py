"""Published timings of single kernels, in one form: what was computed, and how long it took.

Looks for the files where ``SOURCES.md`` of the data folder says they come from; reads them and never copies them.
"""

import csv
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from simulator.latency import kernels
from simulator.latency.efficiency import Efficiency
from simulator.latency.gpus import GpuSpec, find_gpu
from simulator.latency.kernels import Array, Cost

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
PROFILES = DATA / "profiles"
LAYERS = DATA / "groundtruth" / "llmservingsim"

A100, H100, H200 = find_gpu("a100-80g-sxm"), find_gpu("h100-sxm"), find_gpu("h200")
RTX4090, RTXPRO6000 = find_gpu("rtx4090"), find_gpu("rtx-pro-6000")
B200, L40S = find_gpu("b200"), find_gpu("l40s")
# Layers of experts with a gate: Mixtral 8x7B and 8x22B, Qwen3-30B-A3B, -235B-A22B and -Coder-480B-A35B.
_EXPERTS = {(4096, 14336, 8), (6144, 16384, 8), (2048, 768, 128), (4096, 1536, 128), (6144, 2560, 160)}
# AIConfigurator's names of them.
_SYSTEMS = {
    "a100_sxm": A100, "h100_sxm": H100, "h200_sxm": H200, "b200_sxm": B200, "l40s": L40S,
    "rtx_pro_6000_server": RTXPRO6000,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Table:
    """Timings of one ``kind`` of kernel (``gemm``, ``prefill``, ``decode``, ``stream``, ``all_reduce``, ``send``).

    ``rows`` [R, columns]: what :data:`_FORMULAS` says for the kind, the measured seconds last. ``fitted`` False: never
    used in a fit.
    """

    name: str
    kind: str
    gpu: GpuSpec
    rows: Array
    fitted: bool = True

    @property
    def seconds(self) -> Array:
        """What was measured, [R]."""
        return self.rows[:, -1]

    def predict(self, efficiency: Efficiency) -> Array:
        """The formulas' seconds, [R]."""
        return _FORMULAS[self.kind](self.gpu, efficiency, *self.rows[:, :-1].T).seconds

    def sample(self, size: int) -> "Table":
        """Some of its rows, always the same ones."""
        chosen = np.random.default_rng(0).permutation(len(self.rows))[:size]
        return replace(self, rows=self.rows[chosen])


def _mixed_attention(
    gpu: GpuSpec,
    eff: Efficiency,
    tokens: Array,
    pairs: Array,
    batch: Array,
    context: Array,
    heads: Array,
    kv_heads: Array,
) -> Cost:
    prefill = kernels.prefill_attention(gpu, eff, tokens, pairs, heads, kv_heads, 128, 2)
    decode = kernels.decode_attention(gpu, eff, batch, context, heads, kv_heads, 128, 2)
    seconds = prefill.seconds + eff.mixed_decode * decode.seconds
    return Cost(seconds, prefill.flops + decode.flops, prefill.bytes + decode.bytes)


# Columns: gemm m, n, k; expert tokens, hidden and inner columns, experts, experts of a token; prefill tokens, pairs,
# heads, KV heads; decode sequences, cached tokens of all, heads, KV heads; mixed the first two of prefill and all of
# decode; stream bytes; all_reduce bytes, ranks; send bytes. Numbers have 16 bits, heads are 128 wide, links are the
# card's own.
_FORMULAS: dict[str, Callable[..., Cost]] = {
    "gemm": lambda gpu, eff, m, n, k: kernels.gemm(gpu, eff, m, n, k, 2),
    "expert": partial(kernels.experts, item=2),
    "prefill": partial(kernels.prefill_attention, dim=128, item=2),
    "decode": partial(kernels.decode_attention, dim=128, item=2),
    "mixed": _mixed_attention,
    "stream": kernels.stream,
    "all_reduce": lambda gpu, eff, size, ranks: kernels.all_reduce(gpu.link_bandwidth, eff, size, ranks),
    "send": lambda gpu, eff, size: kernels.send(gpu.link_bandwidth, eff, size),
}


def table(name: str, kind: str, gpu: GpuSpec, rows: Sequence[tuple[float, ...]], *, fitted: bool = True) -> Table:
    """A table of ``rows``, one tuple each."""
    return Table(name, kind, gpu, np.array(rows, dtype=float), fitted)


def load_tables() -> list[Table]:
    """Every table, those that take part in fits first."""
    measured = [table for system, gpu in _SYSTEMS.items() for table in _aiconfigurator(system, gpu)]
    return [*measured, *_layer_tables(), *_vidur(), *_apex()]


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file by column."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _aiconfigurator(system: str, gpu: GpuSpec) -> Iterator[Table]:
    """AIConfigurator's measurements of vLLM's and NCCL's kernels (16 bit, whole-window attention of 128-wide heads).

    From the package ``aiconfigurator-core`` if it is installed, else the copies of two cards in the data folder.
    """
    name = f"AIConfigurator {gpu.name}"
    package = importlib.util.find_spec("aiconfigurator_core")
    if package is not None and package.origin is not None:
        folder = Path(package.origin).parent / "systems" / "data" / system
    else:
        folder = PROFILES / "aiconfigurator" / system

    def newest(file: str) -> Path | None:
        found = folder.rglob(f"{file}_perf.parquet")
        versions = [path for path in found if not {"trtllm", "sglang"} & set(path.parts)]
        return max(
            versions,
            key=lambda path: [int(part) for part in path.parent.name.split(".") if part.isdigit()],
            default=None,
        )

    if newest("gemm") is None:
        return
    filters = {
        "moe": [("moe_dtype", "=", "bfloat16"), ("moe_ep_size", "=", 1), ("distribution", "=", "power_law_1.01")],
        "gemm": [("gemm_dtype", "=", "bfloat16"), ("n", ">=", 256), ("k", ">=", 256)],
        "context_attention": [("head_dim", "=", 128), ("kv_cache_dtype", "=", "bfloat16")],
        "generation_attention": [("head_dim", "=", 128), ("kv_cache_dtype", "=", "bfloat16")],
    }

    def rows(file: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]]
        path = newest(file)
        assert path is not None, f"{folder} has GEMMs but no {file}"
        found = pq.read_table(path, filters=filters.get(file)).to_pylist()
        return found

    # A small matrix may stay in the L2 cache from one repetition to the next, which no serving engine sees: rows that
    # took less than reading it from memory takes are left out.
    products = [
        (row["m"], row["n"], row["k"], row["latency"] / 1e3) for row in rows("gemm") if row["n"] * row["k"] >= 4e6
    ]
    kept = [(m, n, k, seconds) for m, n, k, seconds in products if seconds * gpu.memory_bandwidth > 2.06 * n * k]
    yield table(f"{name} GEMM", "gemm", gpu, kept)
    if newest("moe") is not None:
        layers = [
            (
                row["num_tokens"],
                row["hidden_size"],
                row["inter_size"] / row["moe_tp_size"],
                row["num_experts"],
                row["topk"],
                row["latency"] / 1e3,
            )
            for row in rows("moe")
            if (row["hidden_size"], row["inter_size"], row["num_experts"]) in _EXPERTS and row["num_tokens"] <= 16384
        ]
        yield table(f"{name} experts", "expert", gpu, layers)
    prefill, decode = [], []
    for row in [*rows("context_attention"), *rows("generation_attention")]:
        if row.get("window_size", 0):
            continue
        batch, heads, kv_heads = row["batch_size"], row["num_heads"], row["num_key_value_heads"]
        seconds = row["latency"] / 1e3
        if row["op_name"] == "context_attention":
            length = row["isl"]
            prefill.append((batch * length, batch * length * (length + 1) / 2, heads, kv_heads, seconds))
        else:
            decode.append((batch, batch * (row["step"] + row["isl"]), heads, kv_heads, seconds))
    yield table(f"{name} prefill attention", "prefill", gpu, prefill)
    yield table(f"{name} decode attention", "decode", gpu, decode)
    reduces = [
        (row["message_size"] * 2, row["num_gpus"], row["latency"] / 1e3)
        for row in rows("custom_allreduce")
        if row["backend"] == "vllm_graph"
    ]
    yield table(f"{name} all-reduce (vLLM)", "all_reduce", gpu, reduces)
    reduces = [
        (row["message_size"] * 2, row["num_gpus"], row["latency"] / 1e3)
        for row in rows("nccl")
        if row["op_name"] == "all_reduce" and row["nccl_dtype"] == "half"
    ]
    yield table(f"{name} all-reduce (NCCL)", "all_reduce", gpu, reduces, fitted=False)


def _layer_tables() -> Iterator[Table]:
    """LLMServingSim's layer profiles of Llama-3.1-8B under vLLM 0.19."""
    for card, gpu, degrees in (("RTX4090", RTX4090, (1,)), ("RTXPRO6000", RTXPRO6000, (1, 2))):
        for tp in degrees:
            folder = LAYERS / card / "Llama-3.1-8B" / "profile" / f"tp{tp}"
            name = f"LLMServingSim {card} tp{tp}"
            heads, kv_heads, inner = 32 // tp, 8 // tp, 14336 // tp
            products = {
                "qkv_proj": ((heads + 2 * kv_heads) * 128, 4096),
                "o_proj": (4096, heads * 128),
                "gate_up_proj": (2 * inner, 4096),
                "down_proj": (4096, inner),
                "lm_head": (128256 // tp, 4096),
            }
            streams = {"layernorm": 4 * 4096, "act_fn": 3 * inner, "rotary_emb": 2 * (heads + kv_heads) * 128}
            gemms: list[tuple[float, ...]] = []
            moves: list[tuple[float, ...]] = []
            for file, count in (("dense.csv", "tokens"), ("per_sequence.csv", "sequences")):
                for row in read_csv(folder / file):
                    number, layer, seconds = float(row[count]), row["layer"], float(row["time_us"]) / 1e6
                    if layer in products:
                        gemms.append((number, *products[layer], seconds))
                    elif layer in streams:
                        moves.append((number * streams[layer] * 2, seconds))
            yield table(f"{name} GEMM", "gemm", gpu, gemms)
            yield table(f"{name} norms, activation, rotary", "stream", gpu, moves)
            prefill, decode, mixed = [], [], []
            for row in read_csv(folder / "attention.csv"):
                chunk, past, batch, context = (
                    float(row[column]) for column in ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
                )
                seconds, pairs = float(row["time_us"]) / 1e6, chunk * past + chunk * (chunk + 1) / 2
                if not batch:
                    prefill.append((chunk, pairs, heads, kv_heads, seconds))
                elif not chunk:
                    decode.append((batch, batch * context, heads, kv_heads, seconds))
                else:
                    mixed.append((chunk, pairs, batch, batch * context, heads, kv_heads, seconds))
            yield table(f"{name} mixed attention", "mixed", gpu, mixed)
            yield table(f"{name} prefill attention", "prefill", gpu, prefill)
            yield table(f"{name} decode attention", "decode", gpu, decode)


def _vidur() -> Iterator[Table]:
    """Profiles of layers and collectives by vidur; fits see only what no other source measured on the card."""
    for card, gpu, models in (
        ("a100", A100, ("Llama-2-7b", "Llama-2-70b", "Llama-3-8B")),
        ("h100", H100, ("Llama-2-7b", "Llama-2-70b")),
    ):
        for model in models:
            gemms: list[tuple[float, ...]] = []
            moves: list[tuple[float, ...]] = []
            for row in read_csv(PROFILES / "vidur" / f"compute_{card}_{model}_mlp.csv"):
                tp, tokens = int(row["num_tensor_parallel_workers"]), float(row["num_tokens"])
                hidden, inner = int(row["n_embd"]), int(row["n_expanded_embd"]) // tp
                head = hidden // int(row["n_head"])
                heads, kv_heads = int(row["n_head"]) // tp, max(int(row["n_kv_head"]) // tp, 1)
                for layer, n, k in (
                    ("attn_pre_proj", (heads + 2 * kv_heads) * head, hidden),
                    ("attn_post_proj", hidden, heads * head),
                    ("mlp_up_proj", 2 * inner, hidden),
                    ("mlp_down_proj", hidden, inner),
                ):
                    seconds = float(row[f"time_stats.{layer}.median"]) / 1e3
                    if tokens <= 8192 and n * k >= 4e6:
                        gemms.append((tokens, n, k, seconds))
                for layer, columns in (("input_layernorm", 2 * hidden), ("mlp_act", 3 * inner), ("add", 3 * hidden)):
                    moves.append((2 * columns * tokens, float(row[f"time_stats.{layer}.median"]) / 1e3))
            yield table(f"vidur {card.upper()} {model} norm, activation, add", "stream", gpu, moves)
            yield table(f"vidur {card.upper()} {model} linear layers", "gemm", gpu, gemms, fitted=False)
        for collective, number in (("all_reduce", 8), ("send_recv", 2)):
            rows = read_csv(PROFILES / "vidur" / f"network_{card}_dgx_{collective}.csv")
            found = [
                (float(row["size"]), float(row["num_workers"]), float(row[f"time_stats.{collective}.median"]) / 1e3)
                for row in rows
                if row["num_workers"] == row["devices_per_node"] and int(row["num_workers"]) <= number
            ]
            if collective == "all_reduce":
                yield table(f"vidur {card.upper()} all-reduce", "all_reduce", gpu, found, fitted=False)
            else:
                sends = [(size, seconds) for size, _, seconds in found]
                yield table(f"vidur {card.upper()} send", "send", gpu, sends, fitted=card == "a100")


def _apex() -> Iterator[Table]:
    """APEX's collectives; no fit sees them, and nothing else of the H200."""
    for folder, gpu in (("H100-SXM-80GB", H100), ("H200-SXM-141GB", H200)):
        for collective in ("all_reduce", "sendrecv"):
            rows = [
                (float(row["size(kb)"]) * 1024, float(row["num_gpus_per_node"]), float(row["time(us)"]) / 1e6)
                for row in read_csv(PROFILES / "apex" / folder / f"{collective}.csv")
                if row["num_nodes"] == "1" and float(row["size(kb)"]) > 0
            ]
            name = f"APEX {gpu.name} {collective.replace('_', '-')}"
            if collective == "all_reduce":
                yield table(name, "all_reduce", gpu, rows, fitted=False)
            else:
                yield table(name, "send", gpu, [(size, seconds) for size, _, seconds in rows], fitted=False)
