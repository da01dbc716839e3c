"""`distserve launch` of instances of several ranks, from a file to tokens: held against a prediction, and exact."""

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest

from distserve.cluster.profile_file import write_profile
from distserve.core.config import KvConfig, ParallelConfig
from distserve.core.profile import FORMAT, ClusterCosts, Profile, ShapeProfile, StepFit, Surface, Table
from distserve.demo import model_dir
from distserve.engine.worker import Worker
from tests.cluster.serving import Server
from tests.engine.harness import Harness, make_request

NUM_TOKENS = 24
PROMPT = [(7 * i + 11) % 3000 + 3 for i in range(90)]
BODY = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
CONFIG = """
slo: {{ttft: 30, tpot: 5, attainment: 0.9}}
workload: {{prompt: 64, output: 8, arrivals: {{rate: 5}}}}
cluster: {{gpu: cpu, nodes: 1, gpus_per_node: 6, intra_node_bandwidth: 4.0e+9, inter_node_bandwidth: 1.0e+9}}
placement:
  prefill: {{instances: 1, tp: {prefill[0]}, pp: {prefill[1]}{seats[0]}}}
  decode: {{instances: 1, tp: {decode[0]}, pp: {decode[1]}{seats[1]}}}
engine: {{dtype: float32, kv_tokens: 2048, max_batch_tokens: 512}}
"""


def profile(*shapes: tuple[int, int]) -> Profile:
    """Of a machine whose every step takes 10 ms, in these shapes, and whose cluster adds nothing."""
    fit = StepFit(Surface((1, 8), (10, 100), ((0.01, 0.01), (0.01, 0.01))), Table((1, 64), (0.01, 0.01)), 0, 0, 0, 0, 0)
    measured = tuple(
        ShapeProfile(ParallelConfig(tp, pp), fit, through=fit.raised(0.01 * (pp - 1), 0) if pp > 1 else None)
        for tp, pp in shapes
    )
    costs = ClusterCosts(**{field.name: 0.0 for field in fields(ClusterCosts)})
    return Profile(FORMAT, "", {"cores": 2}, "model", "", "float32", 1, 16, 2048, {}, measured, costs)


@contextmanager
def launched(directory: Path, prefill: tuple[int, int], decode: tuple[int, int]) -> Iterator[Server]:
    """A cluster of one instance of each role, of these (tp, pp), after its trial."""
    num_prefill, num_decode = prefill[0] * prefill[1], decode[0] * decode[1]
    slots = [[0, index] for index in range(num_prefill + num_decode)]
    seats = "", ""
    if len(slots) <= len(os.sched_getaffinity(0)):
        # The trial has to be of these instances in this order, whichever is loaded first.
        seats = f", gpus: [{slots[:num_prefill]}]", f", gpus: [{slots[num_prefill:]}]"
    (directory / "config.yaml").write_text(CONFIG.format(prefill=prefill, decode=decode, seats=seats))
    write_profile(profile(prefill, decode), directory / "profile.json")
    options = ("--profile", str(directory / "profile.json"), "--bench-requests", "10")
    program = ("-c", "from placement.launch import launch; launch()")
    server = Server(str(directory / "config.yaml"), *options, log=directory / "log", program=program)
    try:
        server.wait_ready()
        end = time.monotonic() + 60
        while "measured attainment" not in server.log.read_text() and time.monotonic() < end:
            assert server.process.poll() is None, server.log.read_text()
            time.sleep(0.1)
        yield server
    finally:
        server.kill()
        assert server.wait_gone() == {}


@pytest.mark.parametrize(
    ("prefill", "decode"), [((2, 1), (1, 1)), pytest.param((2, 2), (1, 2), marks=pytest.mark.slow)]
)
def test_tokens_are_one_ranks_and_a_prediction_is_made(
    tmp_path: Path, prefill: tuple[int, int], decode: tuple[int, int]
) -> None:
    with launched(tmp_path, prefill, decode) as server:
        said = server.log.read_text()
        assert f"tp {prefill[0]} x pp {prefill[1]}" in said
        assert re.search(r"attainment +100\.0% \(.*?\) +100\.0% \(.*?\)", said), said
        assert "roughly" in said
        with server.open("/v1/completions", BODY) as response:
            tokens = json.load(response)["choices"][0]["token_ids"]
    alone = Harness(Worker(model_dir(), kv=KvConfig(64)))
    assert tokens == alone.generate(make_request(PROMPT), NUM_TOKENS).output
