from hypothesis import given
from hypothesis import strategies as st

from distserve.transfer.progress import NUM_BYTES, SourceProgress


def test_layers_pass_in_order_and_stay_passed():
    memory = bytearray(NUM_BYTES)
    writer, reader = SourceProgress(memoryview(memory)), SourceProgress(memoryview(bytes(NUM_BYTES)))
    assert reader.layers_passed(0, 4) == 0
    writer.open()
    reader = SourceProgress(memoryview(memory).toreadonly())
    assert reader.generation == writer.generation != 0
    assert reader.layers_passed(7, 4) == 0
    writer.begin_step(7)
    assert (reader.layers_passed(6, 4), reader.layers_passed(7, 4), reader.layers_passed(8, 4)) == (4, 0, 0)
    writer.layer_done(7, 2)
    assert (reader.layers_passed(6, 4), reader.layers_passed(7, 4), reader.layers_passed(8, 4)) == (4, 3, 0)
    writer.end_step(7)
    assert (reader.layers_passed(7, 4), reader.layers_passed(8, 4)) == (4, 0)
    writer.retire()
    assert reader.generation == 0


@given(st.lists(st.tuples(st.integers(0, 2**40), st.integers(-1, 200)), min_size=1), st.integers(0, 2**40))
def test_progress_never_goes_back(steps, asked):
    progress = SourceProgress(memoryview(bytearray(NUM_BYTES)))
    before = 0
    for step_id, layer in sorted(steps):
        if layer < 0:
            progress.begin_step(step_id)
        else:
            progress.layer_done(step_id, layer)
        passed = progress.layers_passed(asked, 201)
        assert passed >= before
        before = passed
