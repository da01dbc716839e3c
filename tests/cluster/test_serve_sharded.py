"""Prefill and decode instances of several ranks each, of different shapes, from HTTP to token."""

import json
import os
import signal
import time
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from distserve.core.config import KvConfig
from distserve.demo import model_dir
from distserve.engine.worker import Worker
from tests.cluster.serving import Server
from tests.engine.harness import Harness, make_request

NUM_TOKENS = 24
PROMPT = [(7 * i + 11) % 3000 + 3 for i in range(90)]
BODY = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
CONFIG = """
placement:
  prefill: {{instances: 1, tp: {prefill[0]}, pp: {prefill[1]}}}
  decode: {{instances: 1, tp: {decode[0]}, pp: {decode[1]}}}
engine: {{dtype: float32, kv_tokens: 2048}}
"""


@contextmanager
def serving(directory: Path, prefill: tuple[int, int], decode: tuple[int, int]) -> Iterator[Server]:
    """A cluster of one instance of each role, of these (tp, pp)."""
    (directory / "config.yaml").write_text(CONFIG.format(prefill=prefill, decode=decode))
    server = Server("--config", str(directory / "config.yaml"), log=directory / "log")
    try:
        server.wait_ready()
        yield server
    finally:
        server.kill()
        assert server.wait_gone() == {}


def one_ranks_tokens() -> list[int]:
    """What an engine of one rank generates."""
    return Harness(Worker(model_dir(), kv=KvConfig(64))).generate(make_request(PROMPT), NUM_TOKENS).output


def complete(server: Server, patience: float = 0.0) -> list[int]:
    """The text's tokens; for ``patience`` seconds an instance may be missing."""
    end = time.monotonic() + patience
    while True:
        try:
            with server.open("/v1/completions", BODY) as response:
                tokens: list[int] = json.load(response)["choices"][0]["token_ids"]
                return tokens
        except urllib.error.HTTPError as error:
            if error.code != 503 or time.monotonic() > end:
                raise
        time.sleep(0.2)


def ranks(server: Server) -> set[int]:
    """Processes of ranks other than rank 0, and those that started them."""
    return {pid for pid in server.processes() if b"group.nursery" in Path(f"/proc/{pid}/cmdline").read_bytes()}


@pytest.mark.slow
def test_tokens_are_one_ranks_and_a_killed_rank_is_replaced(tmp_path: Path) -> None:
    expected = one_ranks_tokens()
    with serving(tmp_path, prefill=(2, 2), decode=(1, 2)) as server:
        assert complete(server) == expected
        # 3 ranks beside rank 0 of the prefill instance, 1 of the decode instance, and what started them.
        before = ranks(server)
        assert len(before) == 3 + 1 + 2
        os.kill(max(before), signal.SIGKILL)
        end = time.monotonic() + 10
        while time.monotonic() < end and "was killed by SIGKILL" not in server.log.read_text():
            time.sleep(0.1)
        assert "was killed by SIGKILL" in server.log.read_text()
        # One instance is another now; the other is as it was.
        assert complete(server, patience=60) == expected
        after = ranks(server)
        assert len(after) == len(before)
        assert len(after & before) in {2, 4}


@pytest.mark.slow
@pytest.mark.parametrize(("prefill", "decode"), [((2, 1), (1, 1)), ((1, 1), (2, 2))])
def test_an_instance_of_one_rank_exchanges_kv_with_one_of_several(
    tmp_path: Path, prefill: tuple[int, int], decode: tuple[int, int]
) -> None:
    with serving(tmp_path, prefill, decode) as server:
        assert complete(server) == one_ranks_tokens()


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU")
def test_each_rank_has_a_cpu_of_its_own_where_there_are_enough(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "placement: {mixed: {instances: 1, tp: 2}}\nengine: {dtype: float32, kv_tokens: 2048, threads: 1}\n"
    )
    server = Server("--config", str(tmp_path / "config.yaml"), log=tmp_path / "log")
    try:
        server.wait_ready()
        first, second = sorted(os.sched_getaffinity(0))[:2]
        (instance,) = server.instances()
        assert cpus_of(instance) == {first}
        # The process that started rank 1 only waits.
        assert cpus_of(max(ranks(server))) == {second}
        assert complete(server) == one_ranks_tokens()
    finally:
        server.kill()
        assert server.wait_gone() == {}


def cpus_of(pid: int) -> set[int]:
    """CPUs that any thread of a process may use."""
    return {cpu for task in Path(f"/proc/{pid}/task").iterdir() for cpu in os.sched_getaffinity(int(task.name))}
