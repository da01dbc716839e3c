"""Arrivals, lengths, traces and prompts: what is sent, before anything is sent."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from distserve.bench.arrivals import Gamma, TraceTimes
from distserve.bench.errors import WorkloadError
from distserve.bench.lengths import Fixed, Lognormal, Normal, factor_to_fit, parse_lengths, scale_lengths
from distserve.bench.prompts import TextPrompts, TokenPrompts
from distserve.bench.traces import Trace, read_trace
from distserve.bench.workload import WorkloadSpec

REAL_TRACES = Path(__file__).parents[2].parent / "shared" / "data" / "traces"


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 3.0])
def test_gamma_arrivals_have_the_rate_and_the_variation_asked_for(cv: float) -> None:
    gaps = np.diff(Gamma(cv).times(rng(), 20.0, 100_000, None))
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05, abs=1e-9)


def test_arrivals_keep_both_bounds_and_their_pattern_across_rates() -> None:
    slow = Gamma().times(rng(), 2.0, None, 3000.0)
    fast = Gamma().times(rng(), 4.0, None, 3000.0)
    assert slow.max() < 3000
    assert len(slow) == pytest.approx(6000, rel=0.05)
    np.testing.assert_allclose(fast[: len(slow)] * 2, slow)
    assert len(Gamma().times(rng(), 2.0, 5, 3000.0)) == 5
    assert Gamma().times(rng(), 2.0, 10_000, 100.0).max() < 100


def test_arrivals_without_a_bound_are_refused() -> None:
    with pytest.raises(WorkloadError, match="bound"):
        Gamma().times(rng(), 1.0, None, None)


def test_trace_times_scale() -> None:
    times = TraceTimes(np.array([5.0, 6.0, 9.0]))
    assert times.scaled(2.0).tolist() == [0.0, 2.0, 8.0]
    assert times.scaled(times.factor_for_rate(4.0)).tolist() == [0.0, 0.125, 0.5]
    with pytest.raises(WorkloadError, match="all arrive at once"):
        TraceTimes(np.array([1.0, 1.0])).factor_for_rate(1.0)


def test_length_distributions_have_their_moments() -> None:
    lognormal = Lognormal(300, 0.8).draw(rng(), 200_000)
    assert lognormal.mean() == pytest.approx(300, rel=0.02)
    assert np.log(lognormal).std() == pytest.approx(0.8, rel=0.03)
    normal = Normal(1200, 360).draw(rng(), 100_000)
    assert (normal.mean(), normal.std()) == (pytest.approx(1200, rel=0.02), pytest.approx(360, rel=0.02))


def test_a_maximum_cuts_the_tail_off_without_a_spike() -> None:
    lens = Lognormal(300, 0.8, 600).draw(rng(), 50_000)
    assert lens.max() <= 600
    assert (lens == 600).mean() < 0.002
    with pytest.raises(WorkloadError, match="outside its limits"):
        Normal(10_000, 1, 5).draw(rng(), 10)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("256", Fixed(256)),
        ("fixed:3", Fixed(3)),
        ("lognormal:mean=300,sigma=0.8,max=1500", Lognormal(300, 0.8, 1500)),
        ("normal:std=360,mean=1200", Normal(1200, 360)),
    ],
)
def test_lengths_are_parsed(text: str, expected: object) -> None:
    assert parse_lengths(text) == expected


BAD_LENGTHS = """0;-3;1.5;fixed:;lognormal;lognormal:mean=3;normal:mean=5,std=x;normal:mean=nan,std=1;zipf:a=1;
lognormal:mean=3,sigma=1,maximum=9;normal:mean=5,std=-1;normal:mean=5,std=1,max=0"""


@pytest.mark.parametrize("text", ["", *BAD_LENGTHS.replace("\n", "").split(";")])
def test_bad_lengths_are_refused(text: str) -> None:
    with pytest.raises(WorkloadError, match=r"length|missing|must|not one of"):
        parse_lengths(text)


@given(
    pairs=st.lists(st.tuples(st.integers(1, 200_000), st.integers(1, 50_000)), min_size=1, max_size=50),
    context=st.integers(2, 300_000),
)
def test_fitted_lengths_fit_and_keep_their_proportions(pairs: list[tuple[int, int]], context: int) -> None:
    prompts, outputs = (np.array(lens, np.int64) for lens in zip(*pairs, strict=True))
    factor = factor_to_fit(prompts, outputs, context)
    scaled = scale_lengths(prompts, factor) + scale_lengths(outputs, factor)
    assert factor <= 1
    assert scaled.max() <= context
    assert scaled.min() >= 2
    # The longest is not made shorter than need be: only its two roundings are lost.
    if factor < 1:
        assert scaled.max() >= context - 2
    assert np.all(np.abs(scale_lengths(prompts, factor) - prompts * factor) <= 1)


@given(
    pairs=st.lists(st.tuples(st.integers(1, 200_000), st.integers(1, 50_000)), min_size=1, max_size=50),
    context=st.integers(2, 300_000),
    scale=st.floats(0.01, 4.0),
)
@example(pairs=[(511, 511)], context=917, scale=0.9)
def test_lengths_that_are_scaled_and_fitted_fit(pairs: list[tuple[int, int]], context: int, scale: float) -> None:
    times = np.arange(len(pairs), dtype=np.float64)
    prompts, outputs = (np.array(lens, np.int64) for lens in zip(*pairs, strict=True))
    trace = Trace(prompts, outputs, times)
    spec = WorkloadSpec(TraceTimes(times), None, None, trace=trace, length_scale=scale, fit_context=context)
    workload = spec.at(None)
    totals = workload.prompt_lens + workload.output_lens
    assert totals.max() <= context
    assert workload.length_factor <= scale
    if workload.length_factor < scale:
        assert totals.max() >= context - 2


AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.6805900,396,0
2023-11-16 18:15:47.1805900,91,16
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "trace"
    path.write_text(text)
    return path


def test_azure_trace_is_read_in_order_of_arrival(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, AZURE))
    assert trace.timestamps is not None
    np.testing.assert_allclose(trace.timestamps, [0, 0.5, 4], atol=1e-6)
    assert trace.prompt_lens.tolist() == [374, 91, 396]
    assert trace.output_lens.tolist() == [44, 16, 1]
    window = trace.window(0.25, 1.0)
    assert (len(window), window.prompt_lens.tolist()) == (1, [91])
    with pytest.raises(WorkloadError, match="spans 4 s"):
        trace.window(100, None)


def test_mooncake_trace_is_read_with_its_prefixes(tmp_path: Path) -> None:
    lines = [
        {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]},
        {"timestamp": 1500, "input_length": 700, "output_length": 6, "hash_ids": [0, 2]},
    ]
    trace = read_trace(write(tmp_path, "\n".join(json.dumps(line) for line in lines)))
    assert trace.timestamps is not None
    assert trace.timestamps.tolist() == [0, 1.5]
    prompts = TokenPrompts(1000, 3, trace.prefix_blocks)
    first, second = prompts.make(0, 600), prompts.make(1, 700)
    assert (len(first), len(second)) == (600, 700)
    assert first[:512] == second[:512]
    assert first[512:600] != second[512:600]


SHAREGPT = [
    {"id": "a", "conversations": [{"from": "human", "value": "x" * 40}, {"from": "gpt", "value": "y" * 8}]},
    {"id": "b", "conversations": [{"from": "gpt", "value": "only an answer"}]},
]


def test_sharegpt_uses_the_first_question_and_answer(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps(SHAREGPT))
    estimated = read_trace(path)
    assert (estimated.prompt_lens.tolist(), estimated.output_lens.tolist()) == ([10], [2])
    assert "characters / 4" in estimated.note
    assert "1 of 2 conversations" in estimated.note
    counted = read_trace(path, count_tokens=len)
    assert (counted.prompt_lens.tolist(), counted.output_lens.tolist()) == ([40], [8])
    with pytest.raises(WorkloadError, match="no timestamps"):
        counted.window(0, 1)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (AZURE + "2023-11-16 18:15:51,12\n", r"trace:5: 2 fields"),
        (AZURE + "yesterday,12,3\n", r"trace:5: TIMESTAMP"),
        (AZURE + "2023-11-16 18:15:51,twelve,3\n", r"trace:5: ContextTokens"),
        (AZURE + "2023-11-16 18:15:51,12,-3\n", r"trace:5: GeneratedTokens"),
        ("TIMESTAMP,Context\n1,2\n", r"trace:1: the header"),
        ('{"timestamp": 0, "input_length": 1, "output_length": 1}\n{"timestamp": 1\n', r"trace:2: not JSON"),
        ('{"timestamp": 0, "input_length": 1, "output_length": 1}\n\n{"timestamp": 1}\n', r"trace:3: input_length"),
        ('{"timestamp": "soon", "input_length": 1, "output_length": 1}\n', r"trace:1: timestamp"),
        ('{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": [-1]}\n', r"trace:1: hash_ids"),
        ('{"timestamp": 0, "input_length": 1, "output_length": 1}\n[]\n', r"trace:2: .*object"),
        ('[\n{"conversations": [}\n]', r"trace:2: not JSON"),
        ('[{"conversations": 3}]', r"trace: entry 0: no list"),
        ('[{"conversations": [{"from": 1}]}]', r"trace: entry 0: a turn"),
        ("[]", r"trace: the trace holds no request"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", r"holds no request"),
        ("hello\n", r"trace: not recognised"),
    ],
)
def test_a_malformed_trace_names_the_line(tmp_path: Path, text: str, where: str) -> None:
    with pytest.raises(WorkloadError, match=where):
        read_trace(write(tmp_path, text))


def test_a_trace_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="cannot read the trace"):
        read_trace(tmp_path / "missing")
    (tmp_path / "trace").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(WorkloadError, match="UTF-8"):
        read_trace(tmp_path / "trace")


@pytest.mark.skipif(not REAL_TRACES.is_dir(), reason="the published traces are not beside the repository")
@pytest.mark.parametrize(
    ("name", "num", "span"), [("azure2023_conv.csv", 19366, 3502), ("mooncake_conversation.jsonl", 12031, 3537)]
)
def test_the_published_traces_are_read_whole(name: str, num: int, span: float) -> None:
    trace = read_trace(REAL_TRACES / name)
    assert trace.timestamps is not None
    assert len(trace) == num
    assert trace.timestamps[-1] == pytest.approx(span, rel=0.01)


def test_a_workload_scales_a_traces_lengths_and_times(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, AZURE))
    assert trace.timestamps is not None
    spec = WorkloadSpec(
        arrivals=TraceTimes(trace.timestamps), prompt=None, output=None, trace=trace, time_scale=3.0, fit_context=209
    )
    workload = spec.at(None)
    assert workload.arrivals is not None
    np.testing.assert_allclose(workload.arrivals, [0, 1.5, 12], atol=1e-5)
    assert workload.length_factor == pytest.approx(0.5)
    assert workload.prompt_lens.tolist() == [187, 45, 198]
    assert (workload.prompt_lens + workload.output_lens).max() <= 209
    # The same lengths, again from the start, under random arrivals; the same factor at any rate.
    spec = WorkloadSpec(arrivals=Gamma(), prompt=None, output=None, trace=trace, num_requests=5, fit_context=209)
    assert spec.at(3.0).prompt_lens.tolist() == [187, 45, 198, 187, 45]
    assert spec.at(30.0).length_factor == workload.length_factor
    with pytest.raises(WorkloadError, match="drawn lengths take a limit of their own"):
        replace(spec, prompt=Lognormal(300, 0.8))


def test_prompts_are_exact_repeatable_and_without_common_prefixes() -> None:
    prompts = TokenPrompts(50, 1)
    ids = [prompts.make(i, 100) for i in range(20)]
    assert all(len(prompt) == 100 and min(prompt) >= 0 and max(prompt) < 50 for prompt in ids)
    assert ids == [prompts.make(i, 100) for i in range(20)]
    assert len({tuple(prompt[:8]) for prompt in ids}) == 20
    assert TokenPrompts(50, 2).make(0, 100) != ids[0]
    assert len(TextPrompts(1, tokens_per_word=2.0, overhead_tokens=10.0).make(0, 100).split()) == 45


def test_a_spreadsheet_s_mark_at_the_beginning_is_no_part_of_the_header(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.0,374,44\n", encoding="utf-8-sig")
    assert read_trace(path).prompt_lens.tolist() == [374]


def test_a_quote_that_never_ends_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text('TIMESTAMP,ContextTokens,GeneratedTokens\n"' + "x" * 200_000)
    with pytest.raises(WorkloadError, match=r"trace\.csv:2: not a CSV"):
        read_trace(path)
