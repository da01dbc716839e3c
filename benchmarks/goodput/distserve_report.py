"""DistServe's claims beside simulated figures: the tables and the plots."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.goodput.distserve_published import PUBLISHED

PAPER, OURS, VLLM = "paper's placement", "our placement", "vLLM of 2023"
CHANGES = {
    "as published": ("short", PAPER, VLLM),
    "baseline as fast as DistServe": ("short", PAPER, "same speed"),
    "baseline's batches of 2,560 tokens": ("short", PAPER, "small batches"),
    "baseline by SplitFuse": ("short", PAPER, "SplitFuse"),
    "baseline's steps 10 ms longer": ("short", PAPER, "served"),
    "baseline's best TP": ("short", PAPER, "best shape"),
    "steady state": ("steady", PAPER, VLLM),
    "our placement": ("short", OURS, VLLM),
}
"""The published comparison, and the same with one thing changed."""
STYLES = {
    PAPER: ("tab:green", "-o"),
    OURS: ("tab:olive", "-^"),
    VLLM: ("tab:red", "--v"),
    "same speed": ("tab:orange", "-s"),
    "SplitFuse, same speed": ("tab:blue", "-D"),
}
_LEGEND = {
    PAPER: "disaggregated: the paper's placement",
    OURS: "disaggregated: our placement",
    VLLM: "whole prompts at vLLM's speed of 2023 (the paper's baseline)",
    "same speed": "whole prompts at DistServe's speed",
    "SplitFuse, same speed": "SplitFuse at DistServe's speed",
}

Result = dict[str, Any]
Ratio = Callable[[Result, str, str, str], str]


def rate_ratio(result: Result, runs: str, system: str, baseline: str) -> str:
    """The system's rate for each GPU over the baseline's."""
    ours, theirs = (result[runs][name]["rate"] for name in (system, baseline))
    return _cell(ours, theirs, ours, theirs)


def scale_ratio(result: Result, runs: str, system: str, baseline: str) -> str:
    """The baseline's SLO scale over the system's: how much tighter its limits may be."""
    ours, theirs = (result[runs][name]["scale"] for name in (system, baseline))
    return _cell(theirs, ours, ours, theirs)


def scripted_ratio(result: Result, runs: str, system: str, baseline: str) -> str:
    """The same as the published sweep would show it, which has a lowest and a highest rate."""
    ours, theirs = (result[runs][name]["scripted_rate"] for name in (system, baseline))
    return _cell(ours, theirs, ours, theirs)


def _cell(over: float | None, under: float | None, ours: float | None, theirs: float | None) -> str:
    if ours is None:
        return "it never holds" if theirs is not None else "neither holds"
    if theirs is None or over is None or under is None:
        return f"{ours:.3g} / never"
    return f"**{over / under:.2f}x** ({ours:.3g} / {theirs:.3g})"


def report(results: Sequence[Result], facts: dict[str, Any], num_draws: int) -> str:
    """The tables as Markdown."""
    changed = list(CHANGES)
    policies = ["SplitFuse, vLLM's speed", "SplitFuse", "whole prompts"]
    policies += ["ours over our best SplitFuse", "ours over our best whole prompts"]
    return f"""# DistServe's claims, simulated

{facts["date"][:10]}; `{facts["command"]}`. Mean over {num_draws} draws of each workload; [every point](distserve.csv).
[What it means](../README.md#distserves-claims). "Never": 90% is reached at no rate, or with no factor on the limits.

## Claimed and found

Rate: requests/s and GPU at 90% attainment, DistServe's over the baseline's. SLO: factor on both limits at a fixed rate,
the baseline's over DistServe's. The baseline is one instance of the vLLM of 2023. In brackets: DistServe's / its.

{_rates(results)}

{_scales(results)}

## One assumption changed: rate

{_changes(changed, results, rate_ratio)}

## One assumption changed: SLO scale

{_changes(changed, results, scale_ratio)}

## Both mixed policies

The paper's placement against one instance of the paper's tensor parallelism, at DistServe's speed where no other is
said (DeepSpeed-MII's is not published); then our placement against the best mixed instances that our planner found.
Runs are as long as the paper's: [steady rates](../../paper_cases/results/report.md) of the latter are lower.

{_policies(policies, results, rate_ratio, "rate")}

{_policies(policies, results, scale_ratio, "SLO")}

## The limits of the first version

{_first(results)}

## LongBench with short answers among the long

As published, but for a share of the answers being of 5 tokens and the others longer, so that their mean stays.

{_answers(results)}

![Attainment over rate and SLO scale](distserve.png)
"""


def _rows(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _rates(results: Sequence[Result]) -> str:
    heads = ["rate, over vLLM", "first version", "OSDI", "simulated as published", "within the rates it swept"]
    heads += ["a lone long prompt takes of the TTFT: vLLM", "DistServe"]
    rows = []
    for result in results:
        published, pair = PUBLISHED[result["case"]], CHANGES["as published"]
        claimed = [f"{published.first_rate}x", f"{published.rate_over_vllm}x"]
        lone = [f"{result['short'][name]['lone']:.0%}" for name in (VLLM, PAPER)]
        rows.append([result["case"], *claimed, rate_ratio(result, *pair), scripted_ratio(result, *pair), *lone])
    return _rows(heads, rows)


def _scales(results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        published = PUBLISHED[result["case"]]
        claimed = [f"{published.first_scale}x", f"{published.slo_over_vllm}x"]
        rows.append([result["case"], *claimed, scale_ratio(result, *CHANGES["as published"])])
    return _rows(["SLO, over vLLM", "first version", "OSDI", "simulated as published"], rows)


def _changes(names: Sequence[str], results: Sequence[Result], ratio: Ratio) -> str:
    rows = [[result["case"], *(ratio(result, *CHANGES[name]) for name in names)] for result in results]
    return _rows(["", *names], rows)


def _policies(names: Sequence[str], results: Sequence[Result], ratio: Ratio, what: str) -> str:
    pairs = [
        ("short", PAPER, "SplitFuse"),
        ("short", PAPER, "SplitFuse, same speed"),
        ("short", PAPER, "same speed"),
        ("short", OURS, "our SplitFuse"),
        ("short", OURS, "our whole prompts"),
    ]
    rows = []
    for result in results:
        published = PUBLISHED[result["case"]]
        mii = published.rate_over_mii if what == "rate" else published.slo_over_mii
        claimed = "-" if mii is None else f"{mii}x"
        rows.append([result["case"], claimed, *(ratio(result, *pair) for pair in pairs)])
    return _rows([what, "OSDI, over DeepSpeed-MII", *names], rows)


def _first(results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        if result["first"]:
            published = PUBLISHED[result["case"]]
            limits = published.first_slo
            assert limits is not None
            pair = ("first", PAPER, VLLM)
            cells = [f"{limits.ttft} s / {limits.tpot} s", f"{published.first_rate}x", rate_ratio(result, *pair)]
            rows.append([result["case"], *cells, f"{published.first_scale}x", scale_ratio(result, *pair)])
    return _rows(["", "TTFT / TPOT", "rate, claimed", "simulated", "SLO, claimed", "simulated"], rows)


def _answers(results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        for runs in ("short", *(name for name in result if name.startswith("short answers") and result[name])):
            if any(name.startswith("short answers") and result[name] for name in result):
                share = runs.removeprefix("short answers ") if runs != "short" else "none"
                rows.append([share, rate_ratio(result, runs, PAPER, VLLM), scale_ratio(result, runs, PAPER, VLLM)])
    return _rows(["short answers", "rate", "SLO"], rows)


def draw(results: Sequence[Result], directory: Path) -> None:
    """The paper's figures 8 and 9: attainment over rate above, over SLO scale below."""
    figure = Figure(figsize=(4.2 * len(results), 8), layout="constrained")
    axes = figure.subplots(2, len(results), squeeze=False)
    for column, result in enumerate(results):
        published = PUBLISHED[result["case"]]
        above, below = axes[0][column], axes[1][column]
        for name, (colour, style) in STYLES.items():
            figures = result["short"][name]
            shares = [100 * share for share in figures["attained"]]
            above.plot(figures["rates"], shares, style, color=colour, label=_LEGEND[name], ms=4)
            at_scale = [100 * share for share in figures["attained_at_scale"]]
            below.plot(figures["scales"], at_scale, style[:-1], color=colour)
        slo = result["slo"]
        above.set(title=f"{result['case']}\nTTFT {slo['ttft']} s, TPOT {slo['tpot']} s", xlabel="requests/s and GPU")
        below.set(xlabel=f"SLO scale, at {published.scale_rate} requests/s and GPU", xscale="log")
        below.invert_xaxis()
        below.set_xticks([16, 8, 4, 2, 1, 0.5, 0.25], ["16", "8", "4", "2", "1", "1/2", "1/4"], minor=False)
        below.minorticks_off()
        for axis in (above, below):
            axis.axhline(90, color="gray", ls=":", lw=1)
            axis.set(ylim=(0, 104))
            axis.grid(alpha=0.3)
    for row in axes:
        row[0].set_ylabel("requests within both limits, %")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.savefig(directory / "distserve.png", dpi=90)
