"""Instances of a live cluster change role while requests run: the tokens stay those of transformers' own generate."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from distserve.cluster.local import LocalCluster
from distserve.cluster.owner_backend import OwnerBackend
from distserve.cluster.replay import replay
from distserve.core.config import KvConfig, Role, SchedulerConfig
from distserve.core.errors import ConflictError, UnknownInstanceError
from distserve.core.instance_machine import InstanceMachine
from distserve.core.router import Router
from distserve.demo import model_dir
from tests.cluster.asking import greedy, tokens_of, until_idle
from tests.oracle import demo_model, generate

PROMPTS = [list(range(20 + 7 * number, 20 + 7 * number + 3 + 11 * number)) for number in range(6)]
NUM_TOKENS = 40
KV = KvConfig(num_blocks=96)


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return [generate(demo_model(), prompt, NUM_TOKENS) for prompt in PROMPTS]


async def ask(backend: OwnerBackend, name: str, prompt: list[int]) -> list[int]:
    return await tokens_of(backend, greedy(name, prompt, NUM_TOKENS))


async def until_roles(backend: OwnerBackend, **roles: Role) -> None:
    """Wait until the router says that each instance (dashes as underscores) has its role."""
    async with asyncio.timeout(60):
        while True:
            status = backend.status()
            now = {spec.instance_id: spec.role for spec, _ in status.instances} if status is not None else {}
            if all(now.get(name.replace("_", "-")) is role for name, role in roles.items()):
                return
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("patience", [30.0, 0.05])
async def test_roles_change_under_load_and_the_tokens_are_those_of_generate(
    expected: list[list[int]], patience: float, caching: bool, tmp_path: Path
) -> None:
    scheduler = SchedulerConfig(max_batch_tokens=48, max_batch_size=16, report_interval=0.02, prefix_caching=caching)
    cluster = LocalCluster(model_dir(), prefill=2, decode=2, kv=KV, scheduler=scheduler, log_dir=tmp_path)
    answers: list[tuple[int, list[int]]] = []
    is_over = False

    async def client(number: int) -> None:
        """Ask again and again, so that something is always under way."""
        turn = 0
        while not is_over:
            which = (number + turn) % len(PROMPTS)
            answers.append((which, await ask(cluster_backend, f"r{number}-{turn}", PROMPTS[which])))
            turn += 1

    async with cluster as backend:
        cluster_backend = backend
        clients = [asyncio.create_task(client(number)) for number in range(4)]
        await asyncio.sleep(0.3)
        await backend.change_role("prefill-1", Role.DECODE, patience)
        await until_roles(backend, prefill_1=Role.DECODE)
        await backend.change_role("decode-0", Role.PREFILL, patience)
        await backend.change_role("decode-1", Role.MIXED, patience)
        await until_roles(backend, decode_0=Role.PREFILL, decode_1=Role.MIXED)
        await backend.change_role("prefill-1", Role.PREFILL, patience)
        await until_roles(backend, prefill_1=Role.PREFILL)
        await backend.change_role("decode-0", Role.DECODE, patience)
        await until_roles(backend, decode_0=Role.DECODE)
        # And in their new roles they serve everybody again.
        late = [ask(backend, f"late-{number}", prompt) for number, prompt in enumerate(PROMPTS)]
        answers += enumerate(await asyncio.gather(*late))
        is_over = True
        await asyncio.gather(*clients)
        await until_idle(backend, KV)
        status = backend.status()
        assert status is not None
        assert {r.instance_id: r.num_role_changes for _, r in status.instances} == {
            "prefill-0": 0,
            "prefill-1": 2,
            "decode-0": 2,
            "decode-1": 1,
        }
    for which, tokens in answers:
        assert tokens == expected[which]
    # What the live machines decided, in every role, follows from their logs alone.
    machines: dict[str, Any] = {spec.instance_id: InstanceMachine(spec) for spec in cluster.specs}
    for name, machine in {**machines, "router": Router()}.items():
        for _, event, live, again in replay(tmp_path / f"{name}.log", machine):
            assert live == again, (name, event)
    assert {name: machine.scheduler.spec.role for name, machine in machines.items()} == {
        "prefill-0": Role.PREFILL,
        "prefill-1": Role.PREFILL,
        "decode-0": Role.DECODE,
        "decode-1": Role.MIXED,
    }


async def test_what_cannot_be_is_refused_and_changes_nothing() -> None:
    async with LocalCluster(model_dir(), prefill=1, decode=2, kv=KV) as backend:
        with pytest.raises(ConflictError, match="last prefill"):
            await backend.change_role("prefill-0", Role.DECODE, 1.0)
        with pytest.raises(ConflictError, match="already"):
            await backend.change_role("decode-0", Role.DECODE, 1.0)
        with pytest.raises(UnknownInstanceError, match="decode-7"):
            await backend.change_role("decode-7", Role.DECODE, 1.0)
        assert len(await ask(backend, "r", PROMPTS[1])) == NUM_TOKENS
