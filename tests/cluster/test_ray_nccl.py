"""Ray starts the instances, NCCL moves their KV, and both meet: from HTTP to token, and through faults.

All of it is what ``distserve serve`` starts for a plan on GPUs, but for the cards and NCCL itself: what stands in for
those is in ``rehearsed_cards.py``. NCCL itself is run by ``tests/transfer/nccl``, without Ray.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.oracle import demo_model, generate
from tests.transfer.pools import eventually

from .hosts import RayNodes
from .rehearsed_serve import REHEARSAL, Rehearsal
from .serving import Server
from .test_two_nodes import PROMPT, migrations, wait_for, wait_idle

CONFIG = """
placement:
  prefill: {{instances: 1, gpus: [[[0, 0]]]}}
  decode: {{instances: 1, gpus: [[{decode}]]}}
cluster: {{gpu: h100-sxm, nodes: {nodes}, gpus_per_node: {gpus}}}
engine: {{dtype: float32, kv_tokens: 4096, kv_transport: {transport}, threads: 1}}
"""
SHORT, LONG = 40, 700
"""Tokens of a text; and of one that is still being written when others have hung."""
TRANSFER_TIMEOUT = 5.0
"""Seconds that an operation of NCCL may take; see docs/kv-migration.md."""


@pytest.fixture
def rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rehearsal:
    """Known to all processes of the Ray nodes that are started from here on, as the modules of the tests are."""
    monkeypatch.setenv(REHEARSAL, str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    return Rehearsal(tmp_path)


def config(transport: str, num_nodes: int) -> str:
    """Both instances on one node with two GPUs, or on two nodes with one each."""
    return CONFIG.format(
        decode=[num_nodes - 1, 2 - num_nodes], nodes=num_nodes, gpus=3 - num_nodes, transport=transport
    )


def start(directory: Path, nodes: RayNodes, text: str, card: str) -> Server:
    (directory / "config.yaml").write_text(text)
    flags = ("--config", str(directory / "config.yaml"), "--ray-address", nodes.address, "--card", card)
    program = ("-m", "tests.cluster.rehearsed_serve")
    return Server(*flags, log=directory / "log", environment=nodes.environment, program=program)


@contextmanager
def serving(directory: Path, nodes: RayNodes, text: str, card: str = "open_card") -> Iterator[Server]:
    """A server on ``nodes``, which has to end by itself and to leave no instance behind."""
    server = start(directory, nodes, text, card)
    try:
        server.wait_ready()
        yield server
        server.send(signal.SIGTERM)
        assert server.process.wait(60) == 0, server.log.read_text()
        assert nodes.instances() == set()
    finally:
        server.kill()


class Text(threading.Thread):
    """A text as it comes, and when each token did."""

    def __init__(self, server: Server, num_tokens: int) -> None:
        super().__init__()
        self._stream = server.token_ids(PROMPT, num_tokens)
        self.tokens: list[int] = []
        self.times: list[float] = []
        self.start()

    def run(self) -> None:
        for token in self._stream:
            self.tokens.append(token)
            self.times.append(time.monotonic())

    def whole(self) -> list[int]:
        """All of it, once it has come."""
        self.join(120)
        return self.tokens


def test_ray_places_the_instances_and_nccl_moves_their_kv(tmp_path: Path, rehearsal: Rehearsal) -> None:
    with RayNodes(4, num_gpus=2) as nodes, serving(tmp_path, nodes, config("nccl", 1)) as server:
        texts = [Text(server, SHORT) for _ in range(3)]
        expected = generate(demo_model(), PROMPT, SHORT)
        assert [text.whole() for text in texts] == [expected] * 3
        wait_idle(server)
        assert eventually(lambda: migrations(server)["decode-0"] >= 3, 20), "reports follow the texts"
        assert {end for pair in rehearsal.pairs() for end in pair} == nodes.instances()


@pytest.mark.slow
@pytest.mark.parametrize("second_stage", [[0, 3], [1, 0]])
def test_instances_of_several_cards_move_kv_between_unequal_shapes(
    tmp_path: Path, rehearsal: Rehearsal, second_stage: list[int]
) -> None:
    """The decode instance's stages are on the prefill instance's node, or its second on another."""
    num_nodes = second_stage[0] + 1
    text = f"""
placement:
  prefill: {{instances: 1, tp: 2, gpus: [[[0, 0], [0, 1]]]}}
  decode: {{instances: 1, pp: 2, gpus: [[[0, 2], {second_stage}]]}}
cluster: {{gpu: h100-sxm, nodes: {num_nodes}, gpus_per_node: 4}}
engine: {{dtype: float32, kv_tokens: 4096, kv_transport: nccl, threads: 1}}
"""
    with RayNodes(*[5] * num_nodes, num_gpus=4) as nodes, serving(tmp_path, nodes, text) as server:
        texts = [Text(server, SHORT) for _ in range(2)]
        expected = generate(demo_model(), PROMPT, SHORT)
        assert [text.whole() for text in texts] == [expected] * 2
        wait_idle(server)
        assert eventually(lambda: migrations(server)["decode-0"] >= 2, 20), "reports follow the texts"


@pytest.mark.slow
def test_a_peer_that_hangs_costs_its_deadline_and_one_that_dies_is_met_anew(
    tmp_path: Path, rehearsal: Rehearsal
) -> None:
    expected = generate(demo_model(), PROMPT, LONG)
    with RayNodes(3, 2, num_gpus=1) as nodes, serving(tmp_path, nodes, config("nccl", 2)) as server:
        long = Text(server, LONG)
        assert eventually(lambda: len(long.tokens) > 5, 60)
        num_before = len(rehearsal.pairs())
        prefill, decode = rehearsal.pairs()[0]
        rehearsal.hang(prefill)
        other = Text(server, SHORT)
        assert other.whole() == expected[:SHORT]
        assert len(rehearsal.pairs()) > num_before, "a new generation"
        # The first token is of the prefill, the second came when KV had, by the next generation.
        hung, went_on = other.times[:2]
        assert went_on - hung < 3 * TRANSFER_TIMEOUT
        assert sum(hung < at < went_on for at in long.times) > 20, "others go on meanwhile"
        assert long.whole() == expected

        texts = [Text(server, LONG) for _ in range(2)]
        assert eventually(lambda: all(len(text.tokens) > 5 for text in texts), 60)
        os.kill(decode, signal.SIGKILL)
        assert [text.whole() for text in texts] == [expected] * 2
        wait_for(server, "decode-0.1 is serving")
        assert Text(server, SHORT).whole() == expected[:SHORT]
        wait_idle(server)
        assert migrations(server)["decode-0.1"] > 0
        (successor,) = nodes.instances() - {prefill}
        assert successor != decode
        assert set(rehearsal.pairs()) == {(prefill, decode), (prefill, successor)}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("cupy") is not None, reason="there is CuPy here")
def test_without_cupy_nccl_is_refused_by_the_extra_to_install_and_auto_takes_tcp(
    tmp_path: Path, rehearsal: Rehearsal
) -> None:
    with RayNodes(3, 2, num_gpus=1) as nodes:
        server = start(tmp_path, nodes, config("nccl", 2), "open_card_alone")
        try:
            assert server.process.wait(120) != 0
            assert "pip install -e '.[cuda]'" in server.log.read_text()
        finally:
            server.kill()
        assert nodes.instances() == set()
        with serving(tmp_path, nodes, config("auto", 2), "open_card_alone") as server:
            wait_for(server, "KV between GPUs goes over TCP")
            assert "pip install -e '.[cuda]'" in server.log.read_text()
            assert Text(server, SHORT).whole() == generate(demo_model(), PROMPT, SHORT)
            wait_idle(server)
