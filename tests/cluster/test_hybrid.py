"""A hybrid, one prefill beside one mixed instance, gives the tokens of ``generate`` wherever prompts are computed."""

import asyncio
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distserve.cluster.config import load_config
from distserve.cluster.local import LocalCluster
from distserve.core.config import SLO, KvConfig, Role, SchedulerConfig
from distserve.core.errors import ConfigError
from distserve.core.router import DEFAULT_SLO, RouterConfig
from distserve.demo import model_dir
from tests.cluster.asking import greedy, tokens_of
from tests.oracle import demo_model, generate

from .serving import Server

NUM_TOKENS = 24
PROMPTS = [list(range(20 + 7 * number, 20 + 7 * number + 3 + 9 * number)) for number in range(10)]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return [generate(demo_model(), prompt, NUM_TOKENS) for prompt in PROMPTS]


@pytest.mark.parametrize("num_blocks", [64, 20], ids=["plenty", "evicting"])
async def test_tokens_are_those_of_generate(expected: list[list[int]], num_blocks: int) -> None:
    cluster = LocalCluster(
        model_dir(),
        prefill=1,
        decode=0,
        mixed=1,
        kv=KvConfig(num_blocks),
        scheduler=SchedulerConfig(max_batch_tokens=64, report_interval=0.0, headroom=0.0),
        # TTFT decides: the instance that is sooner done gets the prompt.
        router=RouterConfig(slo=SLO(ttft=0.001, tpot=1000.0), status_interval=0.05),
    )
    async with cluster as backend:
        # Instances have computed something, and said how fast.
        assert await tokens_of(backend, greedy("first", PROMPTS[-1])) == expected[-1]
        requests = [greedy(f"r{number}", prompt) for number, prompt in enumerate(PROMPTS)]
        answers = await asyncio.gather(*(tokens_of(backend, request) for request in requests))
        await asyncio.sleep(0.3)
        status = backend.status()
    assert answers == expected
    assert status is not None
    assert status.num_local_prefills > 0
    assert status.num_remote_prefills > 0
    assert status.num_local_prefills + status.num_remote_prefills >= len(PROMPTS) + 1
    pulls = {spec.role: report.num_pulls for spec, report in status.instances}
    assert pulls[Role.PREFILL] == 0
    assert pulls[Role.MIXED] > 0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("hybrid")
    config = directory / "serve.yaml"
    config.write_text("slo: {ttft: 0.001, tpot: 10}\nplacement: {prefill: {instances: 1}, mixed: {instances: 1}}\n")
    server = Server("--config", str(config), "--kv-tokens", "4096", log=directory / "log")
    try:
        server.wait_ready()
        yield server
    finally:
        server.kill()
        assert server.wait_gone() == {}


def prefills(server: Server) -> dict[str, float]:
    time.sleep(2.5)  # a status or two
    with server.open("/metrics") as response:
        text = response.read().decode()
    return {
        where: float(count)
        for where, count in re.findall(r'^distserve:prefills_total\{where="(\w+)"\} (\S+)$', text, re.MULTILINE)
    }


def test_serve_counts_where_prompts_were_computed(server: Server, expected: list[list[int]]) -> None:
    def answer(number: int) -> list[int]:
        return list(server.token_ids(PROMPTS[number], NUM_TOKENS))

    assert answer(9) == expected[9]
    before = prefills(server)
    assert before == {"local": 0.0, "remote": 1.0}
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        assert list(pool.map(answer, range(len(PROMPTS)))) == expected
    counts = prefills(server)
    assert counts["local"] > 0
    assert counts["remote"] > 1
    assert counts["local"] + counts["remote"] == len(PROMPTS) + 1


def test_the_objective_of_the_file_is_what_prompts_are_divided_for(tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text("slo: {ttft: 0.4, tpot: 0.02}\nplacement: {prefill: {instances: 2}, mixed: {instances: 1}}\n")
    loaded = load_config(config, {}, model_dir())
    assert loaded.slo == SLO(0.4, 0.02)
    assert loaded.pools == ((Role.PREFILL, 2), (Role.MIXED, 1))
    assert load_config(None, {"placement.mixed.instances": 1}, model_dir()).slo == DEFAULT_SLO


HYBRID_ON_TWO_NODES = """
placement: {prefill: {gpus: [[[0, 0]]]}, mixed: {gpus: [[[1, 0]]]}}
cluster: {gpu: cpu, nodes: 2, gpus_per_node: 1}
engine: {kv_transport: shm}
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "placement: {decode: {instances: 1}, mixed: {instances: 1}}",
            ["no request would come to the decode", "--prefill"],
        ),
        (
            HYBRID_ON_TWO_NODES,
            ["prefill on node 0", "mixed on node 1", "shared memory ends at a node", "--kv-transport"],
        ),
    ],
)
def test_a_hybrid_that_cannot_be_is_refused(tmp_path: Path, text: str, expected: list[str]) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(config, {}, model_dir())
    for part in expected:
        assert part in str(error.value)
