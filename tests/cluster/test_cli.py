"""The command line: light, helpful, and clear about what is wrong before anything starts."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from distserve.cli import main
from distserve.cluster.config import load_config
from distserve.cluster.describe import Description, examine
from distserve.core.errors import ConfigError
from distserve.demo import model_dir


def test_the_command_line_imports_nothing_heavy() -> None:
    heavy = "('torch', 'ray', 'transformers', 'fastapi')"
    script = f"import sys, distserve.cli; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("command", [[], ["serve"], ["demo"], ["bench"]])
def test_help_is_there(command: list[str]) -> None:
    result = CliRunner().invoke(main, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_commands_are_listed() -> None:
    output = CliRunner().invoke(main, ["--help"]).output
    for command in ("serve", "demo", "bench"):
        assert f"\n  {command} " in output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["/no/such/model"], "/no/such/model does not exist"),
        (["--prefill", "0", "--decode", "0"], "no instances"),
        (["--decode", "0"], "no decode instance"),
        (["--prefill", "5000"], "5001 instances need more than"),
        (["--dtype", "int8"], "--dtype"),
        (["--kv-transport", "rdma"], "--kv-transport: 'rdma' is wrong, must be 'auto', 'shm', 'tcp' or 'nccl'"),
        (["--prefix-cache-tokens", "64"], "prefix cache, which is off"),
        (["--prefix-caching", "--prefix-cache-tokens", "65", "--kv-tokens", "64"], "more than the KV memory of 64"),
        (["--prefix-caching", "--prefix-cache-tokens", "0"], "--prefix-cache-tokens"),
        (["--port", "99999"], "--port"),
        (["--api-key", ""], "--api-key"),
        (["--kv-tokens", "64", "--kv-memory", "1e6"], "kv_tokens and kv_memory both say"),
        (["--kv-tokens", "-4"], "--kv-tokens"),
        (["--drain-timeout", "nan"], "--drain-timeout"),
        (["--host", "203.0.113.7", "--port", "0"], "cannot listen on 203.0.113.7"),
        (["--host", "no-such-host.invalid", "--port", "0"], "cannot listen on no-such-host.invalid"),
    ],
)
def test_mistakes_end_with_a_sentence(arguments: list[str], expected: str) -> None:
    result = CliRunner().invoke(main, ["serve", *arguments])
    assert result.exit_code == 1
    assert expected in result.output
    assert "Traceback" not in result.output


def test_a_place_where_no_log_can_be_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = CliRunner().invoke(main, ["serve", "--port", "0", "--event-log", str(tmp_path / "file")])
    assert (result.exit_code, len(result.output.splitlines())) == (1, 1)
    assert "file cannot be a directory: File exists" in result.output


def test_a_port_in_use_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = CliRunner().invoke(main, ["serve", "--port", str(port)])
    assert result.exit_code == 1
    assert f"port {port}: Address already in use" in result.output


def test_the_example_configuration_is_valid(tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / "deploy" / "example.yaml"
    assert load_config(example, {}, model_dir()).num_instances == 2
    # So is what is commented out there, but for the model, which does not exist.
    everything = tmp_path / "everything.yaml"
    everything.write_text(example.read_text().replace("\n  # ", "\n  "))
    config = load_config(everything, {}, model_dir())
    assert config.ray_address == "auto"
    assert config.engine.max_model_len == 2048


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A copy of the demo model, to be broken."""
    shutil.copytree(model_dir(), tmp_path / "model")
    return tmp_path / "model"


def complaint(model: Path) -> str:
    with pytest.raises(ConfigError) as error:
        examine(model, "float32")
    return str(error.value)


def test_damaged_models_are_described_as_such(broken: Path) -> None:
    weights = broken / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    assert "model.safetensors" in complaint(broken)
    weights.unlink()
    assert "weights" in complaint(broken) or "safetensors" in complaint(broken)


def test_an_unsupported_architecture_is_refused(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    config.update(model_type="t5", architectures=["T5ForConditionalGeneration"])
    (broken / "config.json").write_text(json.dumps(config))
    with Description(broken, "float32") as description, pytest.raises(ConfigError, match="t5"):
        description.result()


def test_a_good_model_is_described() -> None:
    with Description(model_dir(), "bfloat16") as description:
        facts = description.result()
    assert facts.weight_bytes > 10**6
    assert facts.token_bytes > 0
    assert facts.max_model_len >= 512
