"""The training script: a short run gives a whole model directory, a broken one leaves the old directory alone."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from distserve.demo import model_dir, train
from distserve.demo.train import Budget, rate_factor


@pytest.fixture
def one_thread_as_before():
    """The script sets torch's thread count for its process."""
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def small(monkeypatch):
    """Rows and answers short enough for a test."""
    monkeypatch.setattr(train, "SHORT_ROWS", (1, 64))
    monkeypatch.setattr(train, "SAMPLE_QUESTIONS", ("Hello!",))
    monkeypatch.setattr(train, "MAX_ANSWER_TOKENS", 4)


@pytest.mark.usefixtures("one_thread_as_before", "small")
def test_a_short_run_replaces_the_model_directory(tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "stale").touch()
    train.main(["--steps", "2", "--output", str(folder)])
    assert "2 steps" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not (folder / "stale").exists()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert len(AutoTokenizer.from_pretrained(folder)) == model.config.vocab_size


@pytest.mark.usefixtures("one_thread_as_before", "small")
def test_an_interrupted_run_leaves_the_model_directory_alone(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "kept").touch()
    monkeypatch.setattr(train.BatchSampler, "batch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train.main(["--start-from", str(model_dir()), "--output", str(folder)])
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "kept"]


@pytest.mark.usefixtures("one_thread_as_before", "small")
def test_training_goes_on_from_given_weights_with_their_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train_tokenizer", None)
    train.main(["--start-from", str(model_dir()), "--steps", "1", "--output", str(tmp_path / "model")])
    assert AutoTokenizer.from_pretrained(tmp_path / "model").get_vocab() == (
        AutoTokenizer.from_pretrained(model_dir()).get_vocab()
    )


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--max-minutes", "0"], ["--threads", "0"], ["--rate", "-1"]])
def test_senseless_budgets_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        train.main(arguments)
    assert "must be positive" in capsys.readouterr().err


@given(step=st.integers(0, 10_000), progress=st.floats(0, 1))
def test_learning_rate_factor_stays_between_zero_and_one(step, progress):
    assert 0 <= rate_factor(step, progress) <= 1


def test_learning_rate_warms_up_and_ends_at_zero():
    assert rate_factor(0, 0.0) < 0.1
    assert rate_factor(train.WARMUP_STEPS, 0.0) == 1
    assert rate_factor(10_000, 1.0) == pytest.approx(0, abs=1e-12)


def test_a_budget_ends_by_steps_or_by_time():
    budget = Budget(num_steps=100, max_seconds=60.0)
    assert budget.progress(50, elapsed=6.0) == 0.5
    assert budget.progress(10, elapsed=45.0) == 0.75
    assert budget.progress(10, elapsed=90.0) == 1.0
    assert Budget(100, math.inf).progress(25, elapsed=1e9) == 0.25
