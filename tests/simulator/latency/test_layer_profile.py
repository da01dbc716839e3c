"""Layer times summed into steps: by hand on a made-up profile, and on a measured one at its own points."""

from pathlib import Path

import pytest

from distserve.core.config import ParallelConfig
from distserve.core.errors import ConfigError
from distserve.core.latency import StepShape
from simulator.latency.layer_profile import EngineCosts, LayerProfile, LayerProfileStepTime

MEASURED = Path(__file__).parents[4] / "shared/data/groundtruth/llmservingsim/RTX4090/Llama-3.1-8B/profile/tp1"


def step_time(costs: EngineCosts = EngineCosts()) -> LayerProfileStepTime:
    return LayerProfileStepTime(
        num_layers=10,
        dense={
            "qkv_proj": [(1, 10), (5, 18), (64, 136)],
            "layernorm": [(1, 1), (64, 1)],
            "embedding": [(1, 7), (64, 7)],
        },
        per_sequence={"lm_head": [(1, 100), (8, 107)]},
        attention={
            (0, 0, 1, 16): 2,
            (0, 0, 1, 32): 4,
            (0, 0, 2, 16): 3,
            (0, 0, 2, 32): 7,
            (16, 0, 0, 0): 5,
            (16, 32, 0, 0): 9,
            (32, 0, 0, 0): 15,
            (32, 32, 0, 0): 23,
            (16, 0, 1, 16): 6,
            (16, 32, 1, 16): 10,
            (32, 0, 1, 16): 16,
            (32, 32, 1, 16): 24,
        },
        costs=costs,
    )


def microseconds(shape: StepShape, costs: EngineCosts = EngineCosts()) -> float:
    return step_time(costs).seconds(shape) * 1e6


def test_a_decode_step_is_the_sum_of_its_layers() -> None:
    # Two sequences over 24 tokens each: between (3, 7) of the grid; 12 for two tokens of the dense layer.
    assert microseconds(StepShape(0, 0, 2, 48)) == pytest.approx(7 + 10 * (12 + 2 * 1 + 5) + 101)


def test_a_chunk_beside_cached_tokens_and_a_decode() -> None:
    # 24 tokens after 16 cached ones: half way on both axes of the chunk.
    pairs = 24 * 16 + 24 * 25 // 2
    dense = 18 + (25 - 5) * 2
    assert microseconds(StepShape(24, pairs, 1, 16, 1)) == pytest.approx(7 + 10 * (dense + 2 + 14) + 101)


def test_prompts_of_one_step_share_one_launch() -> None:
    # Two prompts of 32 each: the second one's attention counts beyond the 5 that a launch takes.
    shape = StepShape(64, 2 * 32 * 33 // 2, 0, 0, 2)
    assert microseconds(shape) == pytest.approx(7 + 10 * (136 + 2 + 15 + (15 - 5)) + 101)


def test_what_the_engine_adds() -> None:
    costs = EngineCosts(per_step=1e-3, unequal_contexts=3e-6, graph_sizes=(1, 5, 8))
    # Padded to a graph of 5: its dense layers take 18.
    alike = 1000 + 7 + 10 * (18 + 2 + 5) + 101
    assert microseconds(StepShape(0, 0, 2, 48), costs) == pytest.approx(alike)
    assert microseconds(StepShape(0, 0, 2, 48, 0, 24), costs) == pytest.approx(alike)
    # One of 40 tokens and one of 8: 16 above the mean.
    assert microseconds(StepShape(0, 0, 2, 48, 0, 40), costs) == pytest.approx(alike + 3 * 16)
    with_prompt = [microseconds(StepShape(16, 136, 2, 48, 1, longest), costs) for longest in (24, 40)]
    assert with_prompt[1] - with_prompt[0] == pytest.approx(2 * 3 * 16)


def test_other_shapes_than_one_rank_are_refused() -> None:
    with pytest.raises(ConfigError, match="tp 1 and pp 1 only"):
        LayerProfile(Path("nowhere"), "a card", 32).step_time(ParallelConfig(tp=2))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "cannot read"),
        ("a,b,c\nlm_head,1\n", "line 2: 3 columns"),
        ("a,b,c\nlm_head,1,fast\n", "line 2: could not"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str | None, complaint: str) -> None:
    (tmp_path / "attention.csv").write_text("a,b,c,d,e\n0,0,1,16,2\n16,0,0,0,5\n")
    (tmp_path / "dense.csv").write_text("layer,tokens,time_us\nqkv_proj,1,2\n")
    if text is not None:
        (tmp_path / "per_sequence.csv").write_text(text)
    with pytest.raises(ConfigError, match=rf"per_sequence\.csv.*{complaint}|{complaint}.*per_sequence\.csv"):
        LayerProfile(tmp_path, "a card", 32).step_time(ParallelConfig())


@pytest.mark.skipif(not MEASURED.exists(), reason="no measured profiles here")
def test_a_measured_profile_gives_its_own_points_and_grows_with_work() -> None:
    measured = LayerProfile(MEASURED, "RTX 4090", 32).step_time(ParallelConfig())
    more_of_each = [
        (StepShape(0, 0, 8, 8 * 512), StepShape(0, 0, 8, 8 * 2048)),
        (StepShape(0, 0, 8, 8 * 512), StepShape(0, 0, 32, 32 * 512)),
        (StepShape(512, 512 * 513 // 2, 0, 0, 1), StepShape(2048, 2048 * 2049 // 2, 0, 0, 1)),
    ]
    for less, more in more_of_each:
        assert measured.seconds(less) < measured.seconds(more)
    # Llama-3.1-8B's 15 GB of weights at no more than the card's 1,008 GB/s.
    assert measured.seconds(StepShape(0, 0, 1, 16)) > 15e9 / 1008e9
