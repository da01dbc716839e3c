"""Fits the analytic latency model's coefficients to public measurements and writes them.

    python -m benchmarks.latency_models.fit                 # rewrites simulator/latency/coefficients.toml

Needs the measurements in ``../shared/data`` (``SOURCES.md`` there says where each comes from). What is written are our
own numbers; no measurement is copied.
"""

import argparse
from dataclasses import asdict, fields, replace
from pathlib import Path

from benchmarks.latency_models.fitting import KINDS, fit_engine, fit_kernels, mean
from benchmarks.latency_models.operators import Table, load_tables
from benchmarks.latency_models.steps import Group, load_groups
from simulator.latency.efficiency import COEFFICIENTS, Efficiency, Engine

CARDS = ("a100", "h100", "rtx4090", "rtx-pro-6000")

# Where every fit starts, and what it stays near where the data say little.
START = Efficiency(
    gemm_compute=0.87, gemm_medium=0.95, gemm_narrow=0.85, gemm_small=0.9, gemm_ramp=150.0, gemm_split=2.0,
    gemm_memory=0.87, gemm_overlap=3.5, gemm_launch=4.5e-6,
    attention_compute=0.55, attention_ramp=1.0, attention_memory=0.7, attention_launch=6e-6,
    decode_memory=0.8, decode_ramp=16.0, decode_sequence=1024.0, decode_launch=7e-6, mixed_decode=1.8,
    stream_memory=0.8, stream_launch=2.5e-6,
    all_reduce_bandwidth=0.75, all_reduce_latency=8e-6, all_reduce_hop=1e-6, all_reduce_large=2e-5,
    send_bandwidth=0.8, send_latency=1e-5,
)  # fmt: skip

_COMMON = ("step", "sequence", "layer", "compute", "memory", "attention", "paged", "link", "link_latency")
_HOST = (*_COMMON, "host_prefill", "host_decode")
# The engines of the measured steps: which of their parameters the steps can decide, and the name they are shipped by.
ENGINES: dict[str, tuple[tuple[str, ...], str | None]] = {
    "SwiftTransformer": (_COMMON, "distserve"),
    "vLLM 2023 (DistServe)": (_HOST, "vllm-2023"),
    "vLLM 2023 (Splitwise, a100)": (_HOST, "vllm-2023-azure-a100"),
    "vLLM 2023 (Splitwise, h100)": (_HOST, "vllm-2023-azure-h100"),
    "unfused kernels": (("layer", "compute", "memory", "stream"), None),
    "vLLM 0.19 kernels": ((), None),
}

_HEADER = """\
# Coefficients of the analytic latency model: what simulator/latency/efficiency.py says they mean. Written by
#     python -m benchmarks.latency_models.fit
# and ours: fits to public measurements, none of which is copied here.
#
# kernels.a100, kernels.h100: AIConfigurator's tables of vLLM's GEMMs, attention and all-reduce (Apache-2.0).
# kernels.rtx4090, kernels.rtx-pro-6000: LLMServingSim's layer profiles of Llama-3.1-8B under vLLM 0.19 (MIT).
# Kernels that only move data on A100 and H100, and sends between GPUs of a DGX A100: vidur's tables (MIT).
# What was not measured on a card, and kernels.default: the geometric mean of the cards on which it was.
# engines.distserve, engines.vllm-2023: DistServe's fits for OPT on the A100 (Apache-2.0).
# engines.vllm-2023-azure-*: Splitwise's measurements of Llama-2-70B and BLOOM-176B (MIT).
# engines.vllm: assumed, not fitted; CUDA graphs hide the host but for scheduling and sampling of a step.
"""
_VLLM = Engine(step=3e-4)


def kernel_sets(tables: list[Table]) -> dict[str, Efficiency]:
    """Coefficients by card, and ``default``, from the tables that may take part in a fit."""
    usable = [table for table in tables if table.fitted]
    by_card = {card: [table for table in usable if table.gpu.kernels == card] for card in CARDS}
    sets = {card: fit_kernels(found, START) for card, found in by_card.items() if found}
    default = START
    for kind, prefix in KINDS.items():
        measured = [card for card, found in by_card.items() if any(table.kind == kind for table in found)]
        if not measured:
            continue
        names = [field.name for field in fields(Efficiency) if field.name.startswith(prefix)]
        average = mean([sets[card] for card in measured])
        values = {name: getattr(average, name) for name in names}
        default = replace(default, **values)
        for card in set(sets) - set(measured):
            sets[card] = replace(sets[card], **values)
    # A card without any table is one that nothing is known of.
    return {card: sets.get(card, default) for card in CARDS} | {"default": default}


def engine_of(name: str, groups: list[Group], kernels: dict[str, Efficiency]) -> Engine:
    """The engine ``name`` fitted to its ``groups``."""
    free, _ = ENGINES[name]
    return fit_engine(groups, kernels, free) if free else Engine()


def main() -> None:
    """Fit everything, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=COEFFICIENTS)
    output: Path = parser.parse_args().output
    kernels = kernel_sets(load_tables())
    groups = load_groups()
    sections = [_HEADER, *(_section(f"kernels.{card}", asdict(kernels[card])) for card in ("default", *CARDS))]
    sections.append(_section("engines.vllm", _changed(_VLLM)))
    for name, (_, shipped) in ENGINES.items():
        if shipped:
            engine = engine_of(name, [group for group in groups if group.engine == name], kernels)
            sections.append(_section(f"engines.{shipped}", _changed(engine)))
    output.write_text("\n".join(sections), encoding="utf-8")
    print(f"wrote {output}")


def _changed(engine: Engine) -> dict[str, float]:
    plain = asdict(Engine())
    return {name: value for name, value in asdict(engine).items() if value != plain[name]}


def _section(name: str, values: dict[str, float]) -> str:
    lines = [f"{key} = {float(f'{value:.3g}')!r}" for key, value in values.items()]
    return "\n".join([f"[{name}]", *lines, ""])


if __name__ == "__main__":
    main()
