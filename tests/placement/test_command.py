"""``distserve plan`` from a configuration to a plan that can be launched, on a cluster small enough for a test."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from distserve.cluster.placement_section import read_plan
from placement.command import plan
from placement.config import Overrides, load_problem
from placement.document import SCHEMA
from tests.placement.conftest import CONFIG, OPT_13B, WriteConfig


def run(config: Path, *arguments: str) -> Result:
    result = CliRunner().invoke(plan, [str(config), "--quick", "--jobs", "1", *arguments])
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A directory with the files that one search wrote, and the JSON it printed."""
    directory = tmp_path_factory.mktemp("planned")
    (directory / "opt-13b.json").write_text(json.dumps(OPT_13B))
    data = CONFIG | {"engine": {"dtype": "bfloat16"}, "placement": {"prefill": {}, "decode": {}}}
    config = directory / "service.yaml"
    config.write_text(yaml.safe_dump(data, sort_keys=False))
    result = run(config, "--json", "--output", str(directory / "plan.yaml"), "--plot", str(directory / "plots"))
    document: dict[str, Any] = json.loads(result.stdout)
    return directory, document


def test_the_answer_holds_its_promise_and_fits_the_cluster(planned: tuple[Path, dict[str, Any]]) -> None:
    _, document = planned
    assert document["schema"] == SCHEMA
    assert document["holds"]
    chosen = document["chosen"]
    assert chosen["num_gpus"] <= 2
    assert chosen["point"]["attainment"]["low"] >= 0.9
    assert chosen["point"]["rate"] == 2
    seats = [tuple(gpu) for instance in chosen["placement"] for gpu in instance["gpus"]]
    assert len(seats) == len(set(seats)) == chosen["num_gpus"]
    assert "a100-80g-sxm" in document["latency_source"]


def test_the_placement_in_the_file_is_measured_beside(planned: tuple[Path, dict[str, Any]]) -> None:
    _, document = planned
    roles = [instance["role"] for instance in document["paper"]["placement"]]
    assert roles == ["prefill", "decode"]
    assert document["chosen"]["num_gpus"] <= document["paper"]["num_gpus"]


def test_the_outlook_has_every_question_of_the_report(planned: tuple[Path, dict[str, Any]]) -> None:
    _, document = planned
    labels = [variant["label"] for variant in document["outlook"]["variants"]]
    assert labels[0] == "as planned"
    assert labels[1:7] == ["rate +20%", "rate -20%", "prompts +20%", "outputs +20%", "prompts -20%", "outputs -20%"]
    points = {variant["label"]: variant["point"] for variant in document["outlook"]["variants"]}
    assert points["as planned"]["rate"] == 2
    assert points["rate +20%"]["rate"] == pytest.approx(2.4)
    assert points["rate -20%"]["rate"] == pytest.approx(1.6)
    # Longer prompts take longer, and outputs have no say in when the first token comes.
    means = {label: point["ttft"]["mean"] for label, point in points.items() if point is not None}
    assert means["prompts -20%"] < means["as planned"] < means["prompts +20%"]
    assert any(label.endswith("lost") for label in labels)
    assert any(label.endswith("more") for label in labels)
    assert document["outlook"]["breaks"]
    for curve in document["outlook"]["curves"]:
        rates = [point["rate"] for point in curve["points"]]
        shares = [point["attainment"]["estimate"] for point in curve["points"]]
        assert rates == sorted(rates)
        assert shares[0] > shares[-1]


def test_the_plan_file_is_one_that_can_be_launched(planned: tuple[Path, dict[str, Any]]) -> None:
    directory, document = planned
    seats = read_plan(directory / "plan.yaml")
    expected = [
        (instance["role"], [tuple(gpu) for gpu in instance["gpus"]]) for instance in document["chosen"]["placement"]
    ]
    got = [(wanted.role.value, [(gpu.node, gpu.index) for gpu in wanted.gpus]) for wanted in seats.instances]
    assert sorted(got) == sorted(expected)
    assert all(wanted.limits.kv_tokens for wanted in seats.instances)
    data = yaml.safe_load((directory / "plan.yaml").read_text())
    assert data["slo"] == {"ttft": 0.4, "tpot": 0.1, "attainment": 0.9}
    assert data["prediction"]["attainment"]["low"] >= 0.9
    assert data["engine"] == {"dtype": "bfloat16"}
    # It is a configuration too: it can be planned for again, from wherever it is read.
    assert load_problem(directory / "plan.yaml", Overrides()).rate == 2


def test_the_plots_are_there(planned: tuple[Path, dict[str, Any]]) -> None:
    directory, _ = planned
    assert len(list((directory / "plots").glob("*.png"))) == 4
    assert not list(directory.rglob(".*"))


def test_the_same_seed_gives_the_same_answer_whatever_the_number_of_processes(
    planned: tuple[Path, dict[str, Any]],
) -> None:
    directory, document = planned
    first = dict(document)
    second = json.loads(run(directory / "service.yaml", "--json", "--jobs", "2").stdout)
    for answer in (first, second):
        answer["outlook"] = {**answer["outlook"], "curves": []}  # measured for the plots alone
    for name in ("created", "stats"):
        del first[name], second[name]
    assert first == second


def test_a_report_for_people_and_a_plan_elsewhere(write_config: WriteConfig, tmp_path: Path) -> None:
    elsewhere = tmp_path / "plans"
    elsewhere.mkdir()
    config = write_config()
    text = " ".join(run(config, "--rate", "1", "--output", str(elsewhere / "plan.yaml")).stdout.split())
    for part in ("Plan:", "at 1 requests/s", "What breaks first", "Rivals", "runner-up", "What if", "rate +20%"):
        assert part in text
    data = yaml.safe_load((elsewhere / "plan.yaml").read_text())
    # What was named relative to the configuration is not there, seen from the plan.
    assert data["model"] == str(tmp_path / "opt-13b.json")
    assert data["workload"]["arrivals"] == {"rate": 1, "cv": 1}
    # Planned with the model's own data type, which is not what the engine takes by itself.
    assert data["engine"] == {"dtype": "bfloat16"}


def test_a_step_is_explained_without_a_search(write_config: WriteConfig) -> None:
    both = run(write_config(), "--explain-latency").stdout
    assert "of 1 prompt" in both
    assert "32 decodes over" in both
    one = " ".join(run(write_config(), "--explain-latency", "tp=2,decode=8,context=900").stdout.split())
    assert "8 decodes over 900 tokens each on a100-80g-sxm tp 2 pp 1" in one
    assert "all-reduce" in one
    assert "Source: analytic roofline" in one


def test_help_teaches() -> None:
    result = CliRunner().invoke(plan, ["--help"])
    assert result.exit_code == 0
    for part in ("Examples", "--explain-latency", "distserve launch", "docs/planning.md"):
        assert part in result.output
