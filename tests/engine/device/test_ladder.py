import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.engine.device.ladder import make_ladder, rung_for


@given(max_batch_size=st.integers(1, 3000), batch_size=st.integers(1, 3000))
def test_a_batch_takes_the_smallest_rung_that_holds_it(max_batch_size, batch_size):
    rungs = make_ladder(max_batch_size)
    assert list(rungs) == sorted(set(rungs))
    assert rungs[-1] == max_batch_size
    rung = rung_for(rungs, batch_size)
    if batch_size > max_batch_size:
        assert rung is None
    else:
        assert rung is not None
        assert rung == min(r for r in rungs if r >= batch_size)
        assert rung < 2 * batch_size


@pytest.mark.parametrize(("size", "rungs"), [(1, (1,)), (8, (1, 2, 4, 8)), (12, (1, 2, 4, 8, 12))])
def test_ladders(size, rungs):
    assert make_ladder(size) == rungs
