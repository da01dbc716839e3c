"""``distserve launch`` as a user runs it: from a profile of this machine to a deployment measured, and its refusals."""

import asyncio
import io
import os
import re
import subprocess
import sys
import tomllib
import uuid
from collections.abc import Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from rich.console import Console

import placement.launch
from distserve.cluster.clock import cluster_time
from distserve.cluster.config import load_config
from distserve.cluster.observations import Observer
from distserve.cluster.planner import GROUP
from distserve.cluster.profile_file import write_profile
from distserve.cluster.serve import Endpoint
from distserve.core.config import ParallelConfig, Role
from distserve.core.profile import FORMAT, Profile, ShapeProfile, StepFit, Surface, Table
from distserve.core.topology import Gpu
from distserve.demo import model_dir
from placement.config import Overrides, load_problem
from placement.launch import launch

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "deploy" / "cpu-demo.yaml"
TAG = "DISTSERVE_TEST_TAG"


def run(*command: str | Path, tag: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120", TAG: tag}
    arguments = [sys.executable, "-W", "ignore", *command]
    return subprocess.run(arguments, check=False, capture_output=True, text=True, env=environment, timeout=200)


def tagged(tag: str) -> Iterator[str]:
    """Command lines of live processes that were started under ``tag``, however far down."""
    mark = f"{TAG}={tag}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    yield (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue  # another user's, or just gone


def test_from_a_profile_of_this_machine_to_a_measured_deployment(tmp_path: Path) -> None:
    profile, config = tmp_path / "profile.json", tmp_path / "service.yaml"
    take = "from distserve.cluster.profile_command import profile; profile()"
    taken = run("-c", take, model_dir(), "--quick", "--engine-only", "-o", profile)
    assert taken.returncode == 0, taken.stderr

    # Limits that any machine meets: this is about the way there, not about speed.
    data = yaml.safe_load(DEMO.read_text()) | {"slo": {"ttft": 10.0, "tpot": 5.0, "attainment": 0.9}}
    config.write_text(yaml.safe_dump(data))
    tag = uuid.uuid4().hex
    start = "from placement.launch import launch; launch()"
    options = ("--quick", "--port", "0", "--bench-requests", "30", "--exit-after-bench")
    done = run("-c", start, config, "--profile", profile, *options, tag=tag)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout + done.stderr
    plan = re.search(r"^Plan: (\d) (mixed|prefill) TP1", done.stdout, re.MULTILINE)
    assert plan, said
    assert "profile of model in float32" in done.stdout
    assert re.search(
        rf"^Serving distserve-demo at http://\S+/v1 on {plan[1]} {plan[2]} x 32,768 tokens", said, re.MULTILINE
    )
    table = re.search(r"attainment +([\d.]+)% \(.*?\) +([\d.]+)% \(.*?\)", done.stdout)
    assert table, said
    predicted, measured = map(float, table.groups())
    assert predicted >= 90
    assert measured >= 90
    assert list(tagged(tag)) == []


def test_a_load_that_parts_from_the_plan_is_said_with_the_command_that_plans_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement.launch, "_LOOK_EVERY", 0.01)
    file = tmp_path / "service.yaml"
    file.write_text(DEMO.read_text())
    problem = load_problem(file, Overrides())
    messages = Console(file=io.StringIO(), width=300)
    options: dict[str, Any] = {"bench": False, "exit_after_bench": False, "profile": None}
    config: Any = None
    launcher = placement.launch._Launcher(file, config, problem, 4.0, options, Console(file=io.StringIO()), messages)
    observers: list[Observer] = []

    async def scenario() -> None:
        using = asyncio.create_task(launcher.use(Endpoint("http://127.0.0.1:1", "demo", (), observers.append)))
        await asyncio.sleep(0.05)
        (observer,) = observers
        now = cluster_time()
        for number in range(400):  # 8 requests/s for 50 s, twice the planned rate
            observer.arrived(str(number), now - 50 + number / 8, 200)
            observer.ended(str(number), 40, complete=True)
        await asyncio.sleep(0.2)
        using.cancel()
        await asyncio.wait({using})

    asyncio.run(scenario())
    said = messages.file.getvalue()  # type: ignore[attr-defined]
    assert said.count("The plan no longer holds") == 1
    assert re.search(r"[78]\.?\d* requests/s arrive .*, planned were 4", said)
    again = tmp_path / "service.observed.yaml"
    assert f"distserve plan {again}" in said
    # What it names is a problem the planner takes.
    observed = load_problem(again, Overrides())
    assert observed.rate == pytest.approx(8, rel=0.05)
    assert observed.workload.trace is not None
    assert len(observed.workload.trace) == 400


SERVICE = """
slo: {ttft: 1, tpot: 0.1}
workload: {prompt: 64, output: 8, arrivals: {rate: 2}}
cluster:
  {gpu: cpu, nodes: 1, gpus_per_node: 2, intra_node_bandwidth: 4.0e+9, inter_node_bandwidth: 1.0e+9, profile: p.json}
placement: auto
engine: {kv_tokens: 4096, max_batch_tokens: 256, dtype: float32}
"""


def test_the_planner_answers_placement_auto_of_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the hook that pyproject declares, on a machine whose every step takes 10 ms."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    ((_, value),) = project["project"]["entry-points"][GROUP].items()
    declared = EntryPoints([EntryPoint("auto", value, GROUP)])
    monkeypatch.setattr("distserve.cluster.planner.entry_points", lambda group: declared.select(group=group))
    fit = StepFit(Surface((1, 8), (10, 100), ((0.01, 0.01), (0.01, 0.01))), Table((1, 64), (0.01, 0.01)), 0, 0, 0, 0, 0)
    profile = Profile(
        FORMAT, "", {"cores": 2}, "model", "", "float32", 1, 16, 2048, {}, (ShapeProfile(ParallelConfig(), fit),)
    )
    write_profile(profile, tmp_path / "p.json")
    (tmp_path / "service.yaml").write_text(SERVICE)
    config = load_config(tmp_path / "service.yaml", {}, model_dir())
    (instance,) = config.instances
    assert instance.role is Role.MIXED
    assert instance.gpus == (Gpu(0, 0),)
    assert instance.limits.kv_tokens == 4096
    assert instance.limits.max_batch_tokens == 256
    assert config.cluster is not None
    assert config.cluster.gpus_per_node == 2


ELSEWHERE = f"""
model: {model_dir()}
placement:
  prefill: {{instances: 2, tp: 8, gpus: [{[[0, i] for i in range(8)]}, {[[1, i] for i in range(8)]}]}}
  decode: {{instances: 2, tp: 8, gpus: [{[[2, i] for i in range(8)]}, {[[3, i] for i in range(8)]}]}}
cluster: {{gpu: a100-80g-sxm, nodes: 4, gpus_per_node: 8, intra_node_bandwidth: 3.0e+11, inter_node_bandwidth: 3.0e+9}}
"""


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        (
            "placement: auto",
            [],
            "planning needs the sections slo, workload and cluster; missing: cluster, slo, workload",
        ),
        ("slo: {ttft: 1, tpot: 1}", [], "missing: cluster, workload"),
        ("placement: gone.yaml", [], r"cannot read the plan .*gone\.yaml"),
        ("placement: broken.yaml", [], r"broken\.yaml is no plan"),
        ("modle: x\nplacement: {mixed: {}}", [], "modle is unknown"),
        (
            "placement: {mixed: {}}\nworkload: {prompt: 20, output: 5, arivals: {rate: 1}}",
            [],
            r"line 2: workload\.arivals is unknown",
        ),
        (DEMO.read_text(), ["--profile", "gone.json"], r"cannot read gone\.json"),
        (DEMO.read_text().replace("gpu: cpu", "gpu: h100"), [], "h100-"),
        (ELSEWHERE, [], r"the plan needs 4 nodes of 8 a100-80g-sxm GPUs, the cluster has 1 node of \d+ CPU"),
        (ELSEWHERE, ["--ray-address", "127.0.0.1:1"], "cannot join the Ray cluster at 127.0.0.1:1"),
        ("placement: {mixed: {tp: 5}}", [], "tp 5 does not divide the model's 2 KV heads"),
    ],
)
def test_what_cannot_be_launched_is_refused_before_anything_starts(
    tmp_path: Path, text: str, options: list[str], expected: str
) -> None:
    (tmp_path / "broken.yaml").write_text("hello: [world]\n")
    (tmp_path / "service.yaml").write_text(text)
    result = CliRunner().invoke(launch, [str(tmp_path / "service.yaml"), "--port", "0", *options])
    assert result.exit_code == 1, result.output
    assert re.search(expected, " ".join(result.output.split())), result.output
    assert "Traceback" not in result.output


def test_a_plan_is_shown_with_what_was_predicted_of_it(tmp_path: Path) -> None:
    # Refused for its GPUs, but shown before.
    prediction = "prediction: {rate: 3.0, attainment: {estimate: 0.931}, latency_source: a guess}\n"
    (tmp_path / "plan.yaml").write_text(ELSEWHERE + prediction)
    result = CliRunner().invoke(launch, [str(tmp_path / "plan.yaml"), "--port", "0"])
    assert "planned for 3 requests/s with a predicted attainment of 93.1%, step times from a guess" in result.output
    assert "tp 8 x pp 1" in result.output
