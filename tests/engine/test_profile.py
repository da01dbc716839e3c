import pytest

from distserve.core.config import KvConfig
from distserve.core.errors import ConfigError
from distserve.core.latency import StepShape
from distserve.core.profile import MeasuredStepTime, Measurement, StepFit, Surface, Table, residuals
from distserve.demo import model_dir
from distserve.engine.device.backend import HostBackend
from distserve.engine.fit import fit_steps
from distserve.engine.profile import Grid, make_grid, measure
from distserve.engine.worker import Worker


def test_a_grid_keeps_within_the_limits():
    for quick in (False, True):
        grid = make_grid(512, 48, 1000, quick=quick)
        assert max(batch for batch, _ in grid.decode) == 48
        assert all(context < 1000 for _, context in grid.decode)
        assert max(count * num for count, num, _ in grid.prefill) <= 512
        assert all(num + cached <= 1000 for _, num, cached in grid.prefill)
        assert all(batch + num <= 512 for batch, _, num, _ in grid.mixed)
        assert grid.mixed
    assert len(make_grid(512, 48, 1000, quick=True)) < len(make_grid(512, 48, 1000)) / 2


def test_steps_of_a_real_engine():
    worker = Worker(model_dir(), kv=KvConfig(40), num_threads=1)
    grid = Grid(
        decode=((1, 20), (4, 20), (4, 1000)), prefill=((1, 96, 0), (2, 24, 0), (1, 16, 96)), mixed=((2, 20, 32, 0),)
    )
    calls = []
    measured = measure(worker, grid, num_rounds=2, on_progress=lambda done, total: calls.append((done, total)))
    shapes = [m.shape for m in measured]
    # Four sequences of a thousand tokens do not fit into 40 blocks.
    assert shapes == [
        StepShape(num_decodes=1, decode_context=21 + 3),
        StepShape(num_decodes=4, decode_context=4 * (21 + 3)),
        StepShape(96, 96 * 97 // 2, num_prefills=1),
        StepShape(48, 2 * (24 * 25 // 2), num_prefills=2),
        StepShape(16, 16 * 96 + 16 * 17 // 2, num_prefills=1),
        StepShape(32, 32 * 33 // 2, 2, 42, 1),
    ]
    assert all(0 < m.least <= m.median for m in measured)
    assert [m.count for m in measured] == [10, 10, 2, 2, 2, 2]
    assert calls[-1] == (18, 18)
    fit = fit_steps(measured)
    assert MeasuredStepTime(fit).seconds(shapes[1]) == pytest.approx(measured[1].median)


def test_steps_of_an_engine_on_a_device():
    worker = Worker(model_dir(), kv=KvConfig(40), num_threads=1, backend=HostBackend(), max_batch_size=4)
    grid = Grid(decode=((1, 20), (4, 20)), prefill=((1, 96, 0), (2, 24, 0)), mixed=((2, 20, 32, 0),))
    measured = measure(worker, grid, num_rounds=1, on_progress=lambda *_: None)
    assert [m.shape.num_decodes for m in measured] == [1, 4, 0, 0, 2]
    assert all(0 < m.least <= m.median and m.through is None for m in measured)


def test_a_fit_finds_the_formula_the_times_were_made_of():
    truth = StepFit(
        decode=Surface((1, 8, 64), (35, 259), ((0.01, 0.02), (0.015, 0.03), (0.03, 0.09))),
        prefill=Table((16, 64, 256), (0.02, 0.03, 0.08)),
        per_pair=1e-7,
        per_cached_pair=8e-8,
        per_prompt=1e-4,
        per_decode=2e-4,
        per_context=3e-6,
    )
    exact = MeasuredStepTime(truth)
    shapes = [StepShape(num_decodes=b, decode_context=b * c) for b in (1, 8, 64) for c in (35, 259)]
    shapes += [StepShape(t, p * t // n, 0, 0, n) for t in (16, 64, 256) for n in (1, 2) for p in (t, 4 * t)]
    shapes += [StepShape(t, t * t // 2, b, b * c, 1) for t in (16, 64) for b in (1, 8, 32) for c in (35, 259)]
    measured = [Measurement(shape, exact.seconds(shape), exact.seconds(shape), 1) for shape in shapes]
    fit = fit_steps(measured)
    assert fit.decode == truth.decode
    assert fit.per_pair == pytest.approx(truth.per_pair, rel=1e-3)
    assert fit.per_decode == pytest.approx(truth.per_decode, rel=1e-3)
    assert residuals(MeasuredStepTime(fit), measured).worst < 1e-6


def test_a_profile_without_decode_steps_is_refused():
    prompt = Measurement(StepShape(8, 36, num_prefills=1), 1.0, 1.0, 1)
    with pytest.raises(ConfigError, match="decode steps"):
        fit_steps([prompt])
