"""The Ray cluster files are what ``ray up`` takes, and their heads run commands that exist."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from placement.launch import launch

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "deploy" / "ray").glob("*.yaml"))

VALIDATE = """
import json, sys, yaml
from ray.autoscaler._private.util import prepare_config, validate_config
config = prepare_config(yaml.safe_load(open(sys.argv[1])))
validate_config(config)
json.dump({key: config[key] for key in ("head_start_ray_commands", "available_node_types", "max_workers")}, sys.stdout)
"""


def prepared(file: Path, home: Path) -> dict[str, Any]:
    """The file as ``ray up`` reads it, checked against Ray's own schema; in a process, for Ray leaves files at home."""
    environment = os.environ | {"HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-c", VALIDATE, str(file)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_there_are_files_to_check() -> None:
    assert {file.stem for file in FILES} == {"on-premises", "aws"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_ray_takes_the_file_and_the_head_launches(file: Path, tmp_path: Path) -> None:
    config = prepared(file, tmp_path)
    workers = [kind for kind in config["available_node_types"].values() if kind.get("min_workers")]
    assert workers, "a cluster without workers would wait for its nodes for ever"
    (command,) = [line for line in config["head_start_ray_commands"] if "distserve launch" in line]
    words = shlex.split(command.partition("distserve launch")[2].partition(">")[0])
    options = [word for word in words if word.startswith("--")]
    usage = CliRunner().invoke(launch, ["--help"]).output
    assert {"--ray-address", "--wait-for-nodes"} <= set(options)
    assert all(option in usage for option in options)
    # Authenticated, and at a niceness that lets the engines run.
    starts = [line for line in config["head_start_ray_commands"] if "ray start" in line]
    assert all("RAY_AUTH_MODE=token" in line and "RAY_worker_niceness=0" in line for line in starts)


def test_a_file_ray_would_refuse_fails_here_too(tmp_path: Path) -> None:
    broken = yaml.safe_load((ROOT / "deploy" / "ray" / "aws.yaml").read_text())
    broken["max_workers"] = "many"
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump(broken))
    with pytest.raises(AssertionError, match="many"):
        prepared(tmp_path / "broken.yaml", tmp_path)
