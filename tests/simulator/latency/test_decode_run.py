"""The quick way to the times of a decode batch's steps is the slow way's answer, to the last bit."""

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.core.config import ParallelConfig
from distserve.core.latency import StepShape
from distserve.core.topology import ClusterSpec
from simulator.latency.analytic import AnalyticModel
from simulator.latency.distserve_profile import DistServeStepTime
from simulator.latency.interface import DecodeRunTime
from simulator.latency.shape import ModelShape

LLAMA = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "torch_dtype": "bfloat16",
}
SOURCES = {
    "tables": AnalyticModel(
        ModelShape.from_config(LLAMA, name="small"), ClusterSpec("h100-sxm", 1, 8, 450e9, 50e9)
    ).step_time(ParallelConfig(2, 1)),
    "distserve": DistServeStepTime((0.018, 1e-4, 7e-9), (0.0199, 6.3e-7, 3.9e-5), (0.0072, 5.8e-7, 1.6e-4), 95),
}


@pytest.mark.parametrize("source", SOURCES)
@given(st.integers(1, 9000), st.integers(1, 200_000), st.integers(0, 40))
def test_a_run_is_its_steps(source: str, num_decodes: int, context: int, num_steps: int) -> None:
    step_time = SOURCES[source]
    assert isinstance(step_time, DecodeRunTime)
    shapes = [
        StepShape(num_decodes=num_decodes, decode_context=context + step * num_decodes) for step in range(num_steps)
    ]
    ends = list(accumulate((step_time.seconds(shape) for shape in shapes), initial=12.3))
    assert step_time.decode_ends(num_decodes, context, num_steps, 12.3) == ends[1:]
