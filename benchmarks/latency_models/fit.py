"""Fits the analytic latency model's coefficients to public measurements and writes them.

    python -m benchmarks.latency_models.fit                 # rewrites simulator/latency/coefficients.toml

Needs the measurements in ``../shared/data`` (``SOURCES.md`` there says where each comes from) and, for the cards of its
tables, ``pip install aiconfigurator-core``. What is written are our own numbers; no measurement is copied.
"""

import argparse
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.latency_models.fitting import KINDS, coefficients, fit_engine, fit_kernels, mean
from benchmarks.latency_models.operators import Table, load_tables
from benchmarks.latency_models.steps import Group, load_groups
from simulator.latency.efficiency import COEFFICIENTS, Efficiency, Engine
from simulator.latency.gpus import BORROWED, GPUS

CARDS = ("a100", "h100", "h200", "b200", "l40s", "rtx4090", "rtx-pro-6000")
# Cards are akin that share kernels and a memory system: the data centre's, with HBM, NVLink and the wide tensor
# instructions of their kernels, and those made of graphics chips: GDDR behind a large L2 cache, PCIe between cards.
GRAPHICS = ("l40s", "rtx4090", "rtx-pro-6000")
DATA_CENTRE = tuple(card for card in CARDS if card not in GRAPHICS)

# The kinds of kernel that tensor cores bound, and the share of the peak they reach there.
_ARITHMETIC = {"gemm": "gemm_compute", "prefill": "attention_compute"}
# The card that a set of coefficients is for; of those that differ in memory only, one.
SPECS = {gpu.kernels: gpu for gpu in GPUS if gpu.kernels != "default"}

# Where every fit starts, and what it stays near where the data say little.
START = Efficiency(
    gemm_compute=0.87, gemm_medium=0.95, gemm_narrow=0.85, gemm_small=0.9, gemm_ramp=150.0, gemm_split=2.0,
    gemm_memory=0.87, gemm_overlap=3.5, gemm_launch=4.5e-6,
    expert_compute=0.7, expert_memory=0.9, expert_launch=1e-5,
    attention_compute=0.55, attention_ramp=1.0, attention_memory=0.7, attention_launch=6e-6,
    decode_memory=0.8, decode_ramp=16.0, decode_sequence=1024.0, decode_launch=7e-6, mixed_decode=1.8,
    stream_memory=0.8, stream_launch=2.5e-6,
    all_reduce_bandwidth=0.75, all_reduce_latency=8e-6, all_reduce_hop=1e-6, all_reduce_large=2e-5,
    all_reduce_sharing=0.1,
    send_bandwidth=0.8, send_latency=1e-5,
)  # fmt: skip

_COMMON = ("step", "sequence", "layer", "compute", "memory", "attention", "paged", "link", "link_latency")
_HOST = (*_COMMON, "host_prefill", "host_decode")
# The engines of the measured steps: which of their parameters the steps can decide, and the name they are shipped by.
ENGINES: dict[str, tuple[tuple[str, ...], str | None]] = {
    "SwiftTransformer": (_COMMON, "distserve"),
    "vLLM 2023 (DistServe)": (_HOST, "vllm-2023"),
    "vLLM 2023 (Splitwise)": ((*_HOST, "link_huge"), "vllm-2023-azure"),
    "unfused kernels": (("layer", "compute", "memory", "stream"), None),
    "vLLM 0.19 kernels": ((), None),
}

_HEADER = """\
# Coefficients of the analytic latency model: what simulator/latency/efficiency.py says they mean. Written by
#     python -m benchmarks.latency_models.fit
# and ours: fits to public measurements, none of which is copied here.
#
# kernels.*: AIConfigurator's tables of vLLM's GEMMs, experts, attention and all-reduce (its package, Apache-2.0).
# The RTX 4090, and beside them the RTX PRO 6000: LLMServingSim's layer profiles of Llama-3.1-8B (MIT). Kernels that
# only move data on A100 and H100, sends between GPUs of a DGX A100: vidur's tables (MIT). What was not measured on a
# card: the geometric mean of its kin (data-centre cards, cards of graphics chips) on which it was, else of all, as
# kernels.default. *-pcie: the card with the links of others.
# engines.distserve, engines.vllm-2023: DistServe's fits for OPT on the A100 (Apache-2.0).
# engines.vllm-2023-azure: Splitwise's measurements of Llama-2-70B and BLOOM-176B (MIT).
# engines.vllm: assumed, not fitted; CUDA graphs hide the host but for scheduling and sampling of a step.
"""
_VLLM = Engine(step=3e-4)


def kernel_sets(tables: list[Table], known: dict[tuple[str, ...], Efficiency] | None = None) -> dict[str, Efficiency]:
    """Coefficients by card, and ``default``, from the tables that may take part in a fit.

    What was not measured on a card is the geometric mean of its kin on which it was, else of all cards. ``known`` keeps
    the fits of cards by their tables' names, for calls with nearly the same ones.
    """
    known = {} if known is None else known
    by_card = {card: [table for table in tables if table.fitted and table.gpu.kernels == card] for card in CARDS}
    fitted: dict[str, Efficiency] = {}
    for card, found in by_card.items():
        names = tuple(table.name for table in found)
        if found and names not in known:
            known[names] = fit_kernels(found, START)
        if found:
            fitted[card] = known[names]

    def measured(kind: str, cards: tuple[str, ...]) -> list[Efficiency]:
        """At a power clock of 1; without the arithmetic of throttled cards, which says nothing of what cores reach."""
        return [
            _at_clock(fitted[card], 1 / SPECS[card].power_clock)
            for card in cards
            if any(table.kind == kind for table in by_card[card])
            and not (kind in _ARITHMETIC and SPECS[card].throttle < 1)
        ]

    def expected(card: str, kin: tuple[str, ...]) -> Efficiency:
        """Of a card, by what was measured on it and its kin."""
        found = START
        for kind in KINDS:
            if any(table.kind == kind for table in by_card.get(card, ())):
                found = _with(found, kind, [fitted[card]])
                continue
            found = _with(found, kind, measured(kind, kin) or measured(kind, CARDS))
            if card in SPECS and kind == "gemm":
                found = _at_clock(found, SPECS[card].power_clock)
            if card in SPECS and kind in _ARITHMETIC:
                found = _throttled(found, _ARITHMETIC[kind], SPECS[card].throttle)
        return found

    sets = {card: expected(card, GRAPHICS if card in GRAPHICS else DATA_CENTRE) for card in CARDS}
    sets["default"] = expected("default", CARDS)
    for card, kin in BORROWED.items():
        slower = SPECS[card].power_clock / SPECS[kin].power_clock
        sets[card] = _at_clock(sets[kin], slower)
    for name in ("default", "a100-pcie", "h100-pcie"):
        links = _with(sets[name], "all_reduce", measured("all_reduce", GRAPHICS))
        sets[name] = _with(links, "send", measured("send", GRAPHICS))
    return sets


def _at_clock(base: Efficiency, clock: float) -> Efficiency:
    """``base`` where matrix products, which alone draw all of a card's power, run at another clock."""
    return replace(base, gemm_compute=base.gemm_compute * clock)


def _throttled(base: Efficiency, name: str, throttle: float) -> Efficiency:
    """Kernels that reach some share of what cores can do reach twice that share of half of it, but no more than all."""
    return replace(base, **{name: min(getattr(base, name) / throttle, 1.0)})


def _with(base: Efficiency, kind: str, sources: list[Efficiency]) -> Efficiency:
    """``base`` with the coefficients of one kind of kernel averaged over ``sources``, if there are any."""
    if not sources:
        return base
    average = mean(sources)
    return replace(base, **{name: getattr(average, name) for name in coefficients(KINDS[kind])})


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
    sections = [_HEADER, *(_section(f"kernels.{card}", _fitted(kernels[card])) for card in sorted(kernels))]
    sections.append(_section("engines.vllm", _changed(_VLLM)))
    for name, (_, shipped) in ENGINES.items():
        if shipped:
            engine = engine_of(name, [group for group in groups if group.engine == name], kernels)
            sections.append(_section(f"engines.{shipped}", _changed(engine)))
    output.write_text("\n".join(sections), encoding="utf-8")
    print(f"wrote {output}")


def _fitted(efficiency: Efficiency) -> dict[str, float]:
    values = asdict(efficiency)
    return {name: values[name] for name in coefficients("")}


def _changed(engine: Engine) -> dict[str, float]:
    plain = asdict(Engine())
    return {name: value for name, value in asdict(engine).items() if value != plain[name]}


def _section(name: str, values: dict[str, float]) -> str:
    lines = [f"{key} = {float(f'{value:.3g}')!r}" for key, value in values.items()]
    return "\n".join([f"[{name}]", *lines, ""])


if __name__ == "__main__":
    main()
