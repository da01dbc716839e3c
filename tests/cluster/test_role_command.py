"""``distserve role`` without a server that could answer; with one: ``test_serve_roles.py``."""

import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from distserve.cli import main
from distserve.cluster.deployment import Blueprint, Deployment, Member
from distserve.cluster.parts import Card, ClusterKey, EnginePlan
from distserve.core.config import InstanceSpec, KvConfig, Role
from distserve.core.errors import ConflictError


def test_a_server_that_is_not_there_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    for arguments in ((), ("decode-0", "prefill")):
        result = CliRunner().invoke(main, ["role", *arguments, "--url", f"http://127.0.0.1:{port}"])
        assert result.exit_code == 1
        assert "Is the server running?" in result.output


@pytest.mark.parametrize(
    "arguments", [("decode-0",), ("decode-0", "encode"), ("decode-0", "prefill", "--patience", "-1")]
)
def test_wrong_arguments_are_refused(arguments: tuple[str, ...]) -> None:
    result = CliRunner().invoke(main, ["role", *arguments])
    assert result.exit_code == 2
    assert "prefill" in result.output or "patience" in result.output


def test_a_part_of_a_gpu_measured_out_for_one_role_serves_no_other() -> None:
    spec = InstanceSpec("decode-0", Role.DECODE, KvConfig(16))
    plan = EnginePlan(Path(), "bfloat16", 1, device="cuda:0")
    blueprint = Blueprint((), (spec,), plan, ClusterKey("", ""))
    deployment = Deployment(None, blueprint, Card("api-0", ""), lambda _: None)  # type: ignore[arg-type]
    deployment.members["decode-0"] = Member(0, spec, None)
    with pytest.raises(ConflictError, match="--mixed"):
        deployment.prepare_role("decode-0", Role.PREFILL)
