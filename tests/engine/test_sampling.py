"""The vectorised sampler against a reference that takes one row at a time, as the documentation words it."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from distserve.core.events import NOT_FINITE
from distserve.core.request import SamplingParams
from distserve.engine.sampling import Sampler, SamplingRow, token_logprobs
from distserve.engine.sampling.philox import keys, philox
from distserve.engine.sampling.race import exponentials
from distserve.engine.sampling.truncation import thresholds

VOCAB = 40


def row(
    prompt: list[int] | None = None, output: list[int] | None = None, choice: int = 0, **params: object
) -> SamplingRow:
    return SamplingRow(
        SamplingParams(**{"max_tokens": 100, **params}),
        choice,
        np.array(prompt or [1, 2, 3], dtype=np.int64),
        np.array(output or [], dtype=np.int64),
    )


def reference_logits(row: SamplingRow, logits: np.ndarray) -> np.ndarray:
    """After masks, bias and penalties."""
    params, logits = row.params, logits.astype(np.float64).copy()
    if len(row.output) < params.min_tokens:
        for token in params.end_token_ids:
            logits[token] = -np.inf
    for token, value in params.logit_bias:
        logits[token] += value
    counts = Counter(row.output.tolist())
    for token in set(row.prompt.tolist()) | set(counts):
        repetition = params.repetition_penalty
        logits[token] = logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
    for token, count in counts.items():
        logits[token] -= params.frequency_penalty * count + params.presence_penalty
    return logits


def reference_weights(params: SamplingParams, logits: np.ndarray) -> np.ndarray:
    """Probabilities after temperature, min_p, top_k and top_p."""
    probabilities = np.exp(logits / params.temperature - (logits / params.temperature).max())
    probabilities /= probabilities.sum()
    probabilities[probabilities < params.min_p * probabilities.max()] = 0
    if params.top_k:
        order = np.argsort(-probabilities)
        probabilities[order[params.top_k :]] = 0
    probabilities /= probabilities.sum()
    if params.top_p < 1:
        order = np.argsort(-probabilities)
        before = np.cumsum(probabilities[order]) - probabilities[order]
        dropped = before >= params.top_p
        dropped[0] = False
        probabilities[order[dropped]] = 0
    return probabilities / probabilities.sum()


def reference_exponential(seed: int, choice: int, index: int, token: int) -> float:
    """The random number of one token, in Python's integers."""
    mask = 2**32 - 1
    first, second = keys(*(np.array([x], dtype=np.uint64) for x in (seed, choice, index)))[0].tolist()
    x = token ^ first
    x ^= x >> 16
    x = x * 0x7FEB352D & mask
    x ^= x >> 15
    x = (x + second & mask) * 0x846CA68B & mask
    x ^= x >> 16
    return -math.log1p(-(x + 0.5) / 2**32)


def reference_draw(row: SamplingRow, logits: np.ndarray) -> int:
    processed = reference_logits(row, logits)
    if row.params.temperature == 0:
        return int(processed.argmax())
    weights = reference_weights(row.params, processed)
    times = [reference_exponential(row.params.seed, row.choice, row.index, token) for token in range(len(weights))]
    return int((weights / np.array(times)).argmax())


tokens = st.integers(0, VOCAB - 1)
params = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        "top_p": st.sampled_from([1.0, 0.9, 0.5, 0.01]),
        "top_k": st.sampled_from([0, 1, 5, 39, 1000]),
        "min_p": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.7]),
        "presence_penalty": st.sampled_from([0.0, 0.5, -1.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.4, -0.2]),
        "logit_bias": st.lists(st.tuples(tokens, st.floats(-5, 5)), max_size=3, unique_by=lambda item: item[0]).map(
            tuple
        ),
        "seed": st.integers(0, 2**63),
        "min_tokens": st.integers(0, 4),
        "stop_token_ids": st.lists(tokens, max_size=2, unique=True).map(tuple),
        "eos_token_ids": st.just((7,)),
        "ignore_eos": st.booleans(),
    }
)
plain = st.fixed_dictionaries({"temperature": st.sampled_from([0.0, 1.0]), "seed": st.integers(0, 2**63)})
rows = st.builds(
    lambda prompt, output, choice, kwargs: row(prompt, output, choice, **kwargs),
    st.lists(tokens, min_size=1, max_size=8),
    st.lists(tokens, max_size=6),
    st.integers(0, 3),
    params | plain,
)


@settings(max_examples=100, deadline=None)
@given(batch=st.lists(rows, min_size=1, max_size=6), seed=st.integers(0, 10_000))
def test_each_row_of_a_mixed_batch_is_drawn_as_if_alone(batch: list[SamplingRow], seed: int) -> None:
    rng = np.random.default_rng(seed)
    sampler = Sampler(batch, VOCAB)
    for _ in range(3):
        logits = (rng.standard_normal((len(batch), VOCAB)) * 3).astype(np.float32)
        given_logits = torch.from_numpy(logits.copy())
        drawn = sampler(given_logits).tokens.tolist()
        assert np.array_equal(given_logits.numpy(), logits)
        alone = [Sampler([r], VOCAB)(torch.from_numpy(logits[i : i + 1])).tokens.item() for i, r in enumerate(batch)]
        assert drawn == alone == [reference_draw(r, logits[i]) for i, r in enumerate(batch)]
        batch = [
            SamplingRow(r.params, r.choice, r.prompt, np.append(r.output, token))
            for r, token in zip(batch, drawn, strict=True)
        ]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    words = philox(tuple(np.array([c], np.uint64) for c in counter), tuple(np.array([k], np.uint64) for k in key))
    assert tuple(int(word[0]) for word in words) == expected


def test_random_numbers_differ_in_seed_choice_index_and_token() -> None:
    shapes = ((-1, 1, 1), (1, -1, 1), (1, 1, -1))
    parts = keys(*(np.arange(12, dtype=np.uint64).reshape(shape) for shape in shapes))
    assert parts.shape == (12, 12, 12, 2)
    numbers = exponentials(parts.reshape(-1, 2), 50).double().numpy()
    assert len(np.unique(numbers)) > 0.99 * numbers.size
    assert numbers.min() > 0
    assert stats.kstest(numbers.ravel(), "expon").pvalue > 1e-3
    # Neighbours in any direction are unrelated.
    uniforms = np.exp(-numbers).reshape(12, 12, 12, 50)
    for axis in range(4):
        ahead, behind = np.delete(uniforms, 0, axis).ravel(), np.delete(uniforms, -1, axis).ravel()
        assert abs(stats.spearmanr(ahead, behind).statistic) < 4 / math.sqrt(len(ahead))


@pytest.mark.parametrize(
    "kwargs", [{}, {"temperature": 0.5}, {"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.1, "temperature": 2.0}]
)
@pytest.mark.parametrize("along", ["seed", "index"])
def test_draws_follow_the_distribution(kwargs: dict[str, float], along: str) -> None:
    num_draws = 20_000
    logits = torch.linspace(-2, 2, 12)[torch.randperm(12, generator=torch.Generator().manual_seed(1))]
    if along == "seed":
        batch = [row(seed=seed, **kwargs) for seed in range(num_draws)]
        drawn = Sampler(batch, 12)(logits.expand(num_draws, -1)).tokens.numpy()
    else:
        sampler = Sampler([row(seed=seed, **kwargs) for seed in range(100)], 12)
        drawn = torch.cat([sampler(logits.expand(100, -1)).tokens for _ in range(num_draws // 100)]).numpy()
    expected = reference_weights(row(**kwargs).params, logits.double().numpy()) * num_draws
    counts = np.bincount(drawn, minlength=12)
    assert not counts[expected == 0].any()
    possible = expected > 0
    assert stats.chisquare(counts[possible], expected[possible]).pvalue > 1e-3


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([0.001, 1.0, 6.0]),
    settings_of_rows=st.lists(
        st.tuples(
            st.sampled_from([0, 1, 200, 300, 1999]),
            st.sampled_from([1.0, 0.999, 0.9, 0.1]),
            st.sampled_from([0.0, 1e-6, 0.2]),
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_thresholds_in_a_large_vocabulary(
    seed: int, spread: float, settings_of_rows: list[tuple[int, float, float]]
) -> None:
    """Flat distributions need more candidates than are sorted at first."""
    logits = torch.randn(len(settings_of_rows), 2000, generator=torch.Generator().manual_seed(seed)) * spread
    top_k, top_p, min_p = (torch.tensor(column) for column in zip(*settings_of_rows, strict=True))
    kept = logits >= thresholds(logits, top_k, top_p.float(), min_p.float()).unsqueeze(1)
    for i, (k, p, m) in enumerate(settings_of_rows):
        weights = reference_weights(SamplingParams(1, top_k=k, top_p=p, min_p=m), logits[i].double().numpy())
        # Float32 sums may place the border one token off.
        assert abs(int(kept[i].sum()) - int((weights > 0).sum())) <= 1


def test_ties_with_the_last_token_kept_are_kept() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    kept = logits >= thresholds(logits, torch.tensor([2]), torch.tensor([1.0]), torch.tensor([0.0]))
    assert kept.tolist() == [[False, True, True, True, True, False]]


def test_rows_without_finite_logits_get_no_token_and_harm_no_other() -> None:
    logits = torch.randn(6, VOCAB)
    logits[1, 3] = torch.nan
    logits[3] = -torch.inf
    logits[4, 0] = torch.inf
    batch = [row(temperature=t, seed=i, logprobs=2) for i, t in enumerate((0.0, 0.0, 1.0, 1.0, 0.0, 1.0))]
    for penalty in (1.0, 1.2):
        mixed = [*batch[:-1], row(temperature=1.0, seed=5, repetition_penalty=penalty)]
        drawn = Sampler(mixed, VOCAB)(logits).tokens.tolist()
        assert [token == NOT_FINITE for token in drawn] == [False, True, False, True, True, False]
        for i in (0, 2, 5):
            assert drawn[i] == Sampler([mixed[i]], VOCAB)(logits[i : i + 1]).tokens.item()


def test_tokens_outside_the_vocabulary_are_ignored() -> None:
    logits = torch.randn(1, VOCAB)
    odd = row(temperature=0.0, logit_bias=((VOCAB, 100.0),), min_tokens=3, stop_token_ids=(VOCAB + 5,))
    assert Sampler([odd], VOCAB)(logits).tokens.item() == logits.argmax().item()


@pytest.mark.parametrize("temperature", [1e-6, 1e-4])
def test_tiny_temperatures_are_greedy(temperature: float) -> None:
    logits = torch.randn(50, VOCAB) * 10
    drawn = Sampler([row(temperature=temperature, seed=s) for s in range(50)], VOCAB)(logits).tokens
    assert drawn.tolist() == logits.argmax(-1).tolist()


def test_equal_logits_go_to_the_lowest_token() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0]], dtype=torch.bfloat16)
    for kwargs in ({}, {"presence_penalty": 0.1}):
        assert Sampler([row(temperature=0.0, prompt=[0], **kwargs)], 4)(logits).tokens.item() == 1


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = torch.randn(3, VOCAB)
    batch = [
        row(temperature=0.5, logprobs=3, logit_bias=((4, 100.0),)),
        row(temperature=0.0),
        row(temperature=0.0, logprobs=0),
    ]
    draw = Sampler(batch, VOCAB)(logits)
    assert draw.logprobs is not None
    assert draw.tokens[0] == 4
    expected = logits.log_softmax(-1)
    first, none, last = draw.logprobs
    assert none is None
    assert first is not None
    assert first.logprob == pytest.approx(expected[0, 4].item())
    assert first.rank == 1 + int((logits[0] > logits[0, 4]).sum())
    values, ids = expected[0].topk(3)
    assert [token for token, _ in first.top] == ids.tolist()
    assert [value for _, value in first.top] == pytest.approx(values.tolist())
    assert last is not None
    assert (last.rank, last.top) == (1, ())


def test_logprobs_of_many_rows() -> None:
    logits = torch.randn(150, VOCAB, dtype=torch.bfloat16)
    tokens = torch.arange(150) % VOCAB
    entries = token_logprobs(logits, tokens, [1] * 150)
    expected = logits.float().log_softmax(-1)
    assert [entry.logprob for entry in entries] == pytest.approx(expected[torch.arange(150), tokens].tolist())
    assert [entry.top[0][1] for entry in entries] == pytest.approx(expected.amax(-1).tolist())
