import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.core.config import ParallelConfig
from distserve.core.errors import ConfigError
from distserve.core.latency import StepShape
from distserve.core.profile import MeasuredStepTime, Measurement, ShapeProfile, StepFit, Surface, Table, residuals

FIT = StepFit(
    decode=Surface((1, 4, 16), (10, 100, 1000), ((1.0, 2.0, 8.0), (2.0, 4.0, 20.0), (3.0, 9.0, 60.0))),
    prefill=Table((2, 8, 64), (1.0, 1.5, 6.0)),
    per_pair=1e-3,
    per_cached_pair=5e-4,
    per_prompt=0.25,
    per_decode=0.125,
    per_context=2e-3,
)


def decode(num_sequences: int, mean_context: float) -> StepShape:
    return StepShape(num_decodes=num_sequences, decode_context=round(num_sequences * mean_context))


def test_what_was_measured_comes_back():
    step_time = MeasuredStepTime(FIT)
    for batch, row in zip(FIT.decode.batches, FIT.decode.values, strict=True):
        for context, value in zip(FIT.decode.contexts, row, strict=True):
            assert step_time.seconds(decode(batch, context)) == pytest.approx(value)
    for tokens, value in zip(FIT.prefill.knots, FIT.prefill.values, strict=True):
        assert step_time.seconds(StepShape(tokens, 0, num_prefills=1)) == pytest.approx(value)


def test_between_and_beyond_what_was_measured():
    step_time = MeasuredStepTime(FIT)
    assert step_time.seconds(decode(4, 550)) == pytest.approx((4.0 + 20.0) / 2)
    assert step_time.seconds(decode(10, 100)) == pytest.approx((4.0 + 9.0) / 2)
    assert step_time.seconds(decode(28, 100)) == pytest.approx(9.0 + 5.0)
    assert step_time.seconds(decode(4, 1900)) == pytest.approx(20.0 + 16.0)
    assert step_time.seconds(StepShape(1000, 0, num_prefills=1)) == pytest.approx(6.0 + 936 * 4.5 / 56)
    assert step_time.seconds(StepShape()) == 0.0


def test_every_kind_of_work_in_a_step_counts():
    shape = StepShape(num_prefill_tokens=5, prefill_pairs=400, num_decodes=3, decode_context=500, num_prefills=2)
    # A prompt of five tokens has fifteen pairs of its own.
    pairs = 15 * 1e-3 + 385 * 5e-4
    assert MeasuredStepTime(FIT).seconds(shape) == pytest.approx(1.5 + pairs + 0.25 + 3 * 0.125 + 1.0)


@given(
    st.integers(0, 100), st.integers(0, 10_000), st.integers(0, 40), st.integers(0, 60_000), st.integers(1, 8),
    st.floats(0, 1), st.floats(0, 0.1),
)  # fmt: skip
def test_a_cluster_adds_to_every_step(tokens, pairs, num_decodes, context, prompts, per_step, per_sequence):
    shape = StepShape(tokens, pairs, num_decodes, context if num_decodes else 0, prompts if tokens else 0)
    alone = MeasuredStepTime(FIT).seconds(shape)
    if tokens or num_decodes:
        expected = alone + per_step + per_sequence * (num_decodes + shape.num_prefills)
        raised = MeasuredStepTime(FIT.raised(per_step, per_sequence)).seconds(shape)
        # Extrapolation below the first knot stops at zero, wherever that is.
        assert raised == pytest.approx(expected) or tokens + num_decodes < FIT.prefill.knots[0]


def test_one_knot_is_a_constant():
    step_time = MeasuredStepTime(StepFit(Surface((2,), (7,), ((3.0,),)), Table((4,), (5.0,)), 0, 0, 0, 0, 0))
    assert step_time.seconds(decode(9, 1000)) == 3.0
    assert step_time.seconds(StepShape(99, 0, num_prefills=1)) == 5.0


def test_tables_that_are_none_are_refused():
    with pytest.raises(ConfigError, match="rising"):
        Table((1, 1), (0.0, 0.0))
    with pytest.raises(ConfigError, match="as many"):
        Table((1, 2), (0.0,))
    with pytest.raises(ConfigError, match="rows"):
        Surface((1, 2), (3,), ((0.0,),))


def test_residuals_are_relative_and_without_sign():
    step_time = MeasuredStepTime(FIT)
    times = [step_time.seconds(decode(4, 10)) * factor for factor in (1.0, 1.25, 0.8)]
    found = residuals(step_time, [Measurement(decode(4, 10), time, time, 1) for time in times])
    assert found.count == 3
    assert found.median == pytest.approx(0.2)
    assert found.worst == pytest.approx(0.25)


def test_a_pipeline_is_what_its_busiest_stage_and_all_together_take():
    through = FIT.raised(0.7, 0.0)
    step_time = MeasuredStepTime(FIT, through, 3)
    for shape in (decode(4, 100), StepShape(30, 465, num_prefills=1), StepShape(20, 210, 4, 400, 1)):
        alone = MeasuredStepTime(through).seconds(shape)
        assert 3 * step_time.seconds(shape) + 2 * step_time.handover(shape) == pytest.approx(alone)
    assert MeasuredStepTime(FIT).handover(decode(4, 100)) == 0


def test_a_shape_says_how_long_a_pipeline_takes_if_it_is_one():
    for parallel, through in ((ParallelConfig(2, 1), FIT), (ParallelConfig(1, 2), None)):
        with pytest.raises(ConfigError, match="through all pipeline stages"):
            ShapeProfile(parallel, FIT, through=through)
