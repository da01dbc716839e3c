"""Prefill and decode on one card, a fake one: two processes, KV going from one's memory to the other's.

All else is what ``serve --gpu`` starts: instances, router, owner, and the messages between them; Ray only starts them.
"""

import asyncio
import re
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from distserve.cli import main
from distserve.cluster.clock import TimerThread, cluster_time
from distserve.cluster.config import load_config
from distserve.cluster.describe import ModelFacts
from distserve.cluster.driver import Driver
from distserve.cluster.gpu_memory import CardMemory, Limits, ModelMemory, split_card
from distserve.cluster.gpu_probe import GpuFacts
from distserve.cluster.launch import _blueprint
from distserve.cluster.network import Mailbox, ReceiverThread, create_key
from distserve.cluster.owner_backend import OwnerBackend
from distserve.cluster.parts import OWNER, Card
from distserve.cluster.serve import _receive
from distserve.core.config import Role
from distserve.core.errors import ConfigError
from distserve.core.events import InstanceUp, Timer
from distserve.core.owner import Owner
from distserve.core.router import Router
from distserve.core.scheduler import ROUTER
from distserve.demo import model_dir
from tests.cluster import gpu_instance
from tests.cluster.asking import greedy, tokens_of
from tests.oracle import demo_model, generate
from tests.peers import Peer

PROMPTS = [list(range(20 + 7 * number, 20 + 7 * number + 3 + 23 * number)) for number in range(5)]
NUM_TOKENS = 24
HOST = "127.0.0.1"
NO_GPU = pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has a GPU")


class RouterThread:
    """A router within this process."""

    def __init__(self, key):
        self.mailbox = Mailbox(ROUTER, key, HOST)
        self.timers = TimerThread(lambda: self.driver.feed(Timer()))
        self.driver = Driver(Router(), cluster_time, self.mailbox, self.timers)
        self.receiver = ReceiverThread(self.mailbox, self.driver.feed)

    def start(self):
        self.timers.start()
        self.driver.start()
        self.receiver.start()

    def close(self):
        self.receiver.close()
        self.driver.stop()
        self.timers.close()
        self.mailbox.close()


async def test_two_roles_on_one_card_give_the_tokens_of_generate():
    key = create_key()
    prefill, decode = (Peer(gpu_instance.main, role=role, key=key) for role in ("prefill", "decode"))
    router, mailbox = RouterThread(key), Mailbox(OWNER, key, HOST)
    loop = asyncio.get_running_loop()
    backend = OwnerBackend(OWNER, Owner(OWNER), mailbox, loop)
    try:
        expected = [generate(demo_model(), prompt, NUM_TOKENS) for prompt in PROMPTS]
        cards = [process.read() for process in (prefill, decode)]
        assert "cuda-ipc:fake-0/" in cards[0].kv_address
        everyone = [*cards, Card(ROUTER, router.mailbox.endpoint), Card(OWNER, mailbox.endpoint)]
        endpoints = {card.name: card.endpoint for card in everyone}
        router.mailbox.meet({name: end for name, end in endpoints.items() if name != ROUTER})
        mailbox.meet({name: end for name, end in endpoints.items() if name != OWNER})
        router.start()
        _receive(loop, mailbox, backend)
        backend.start()
        for process in (prefill, decode):
            assert process.call("meet", everyone) == ()
        for process, role in ((prefill, "prefill"), (decode, "decode")):
            process.call("start")
            router.driver.feed(InstanceUp(gpu_instance.spec(role)))
        await backend.ready(2)

        async def ask(name):
            requests = [greedy(f"{name}{i}", prompt, NUM_TOKENS) for i, prompt in enumerate(PROMPTS)]
            return await asyncio.gather(*(tokens_of(backend, request) for request in requests))

        assert await ask("a") == expected
        assert decode.call("copies") >= len(PROMPTS)
        assert prefill.call("copies") == 0
        # Pulls that cannot be made cost time, no request and no token.
        decode.call("refuse", len(PROMPTS))
        assert await ask("b") == expected
        assert decode.call("refuse", 0) == 0
    finally:
        loop.remove_reader(mailbox.fileno)
        backend.close()
        router.close()
        mailbox.close()
        for process in (prefill, decode):
            process.kill()


@NO_GPU
def test_serve_on_a_gpu_where_there_is_none_says_so_in_a_sentence():
    done = CliRunner().invoke(main, ["serve", "--gpu", "0", "--port", "0"])
    assert done.exit_code == 1
    (line,) = [line for line in done.output.splitlines() if line.startswith("Error: ")]
    assert re.match(r"Error: (GPU 0 needs a torch built for CUDA|no GPU 0: torch finds no NVIDIA card)", line)
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"serving.ray_address": "auto"}, "is a GPU of this machine"),
        ({"engine.kv_transport": "tcp"}, "kv_transport tcp is for KV in host memory"),
        ({"engine.kv_interface": "eth1"}, "kv_interface is for KV between hosts"),
        ({"placement.decode.tp": 2}, "a decode instance of 2 ranks wants one for each"),
        ({"placement.decode.kv_tokens": 512}, "kv_tokens of a pool does not go with"),
        ({"engine.gpu": -1}, "--gpu: -1 is wrong"),
    ],
)
def test_what_does_not_go_with_one_gpu_is_refused(flags, says):
    with pytest.raises(ConfigError, match=says):
        load_config(None, {"engine.gpu": 0, **flags}, model_dir())


def test_instances_get_their_parts_of_the_card():
    config = load_config(None, {"engine.gpu": 3, "engine.max_model_len": 256}, model_dir())
    card = CardMemory(3, "card", 8 * 2**30, 8 * 2**30)
    model = ModelMemory("float32", 2**20, 2048, 4096, 4096, 4096)
    facts = ModelFacts(weight_bytes=2**20, token_bytes=2048, max_model_len=1024, num_layers=4, num_kv_heads=2)
    blueprint = _blueprint(config, facts, 1, create_key(), GpuFacts(card, model))
    assert blueprint.plan.device == "cuda:0", "the one GPU that the instances see"
    limits = Limits(config.engine.max_batch_tokens, config.engine.max_batch_size, 256)
    parts = split_card(card, [Role.PREFILL, Role.DECODE], model, limits, config.engine.kv)
    assert [spec.kv for spec in blueprint.specs] == [part.kv for part in parts]
    assert all(spec.scheduler.lookahead and spec.scheduler.max_in_flight == 2 for spec in blueprint.specs)
    with pytest.raises(ConfigError, match=r"GPU 3 .* are missing"):
        _blueprint(config, facts, 1, create_key(), GpuFacts(replace(card, free=2**20), model))


def test_the_gpu_is_part_of_the_configuration(tmp_path):
    file = tmp_path / "service.yaml"
    file.write_text("engine: {gpu: 1, dtype: bfloat16}\n")
    assert load_config(file, {}, model_dir()).engine.gpu == 1
    assert load_config(None, {}, model_dir()).engine.gpu is None
