"""Prompts go where their head is, unless they would be done sooner elsewhere."""

from dataclasses import replace
from typing import Any
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distserve.core.commands import Send
from distserve.core.config import InstanceSpec, KvConfig, Role, SchedulerConfig
from distserve.core.events import Event, InstanceLost, InstanceUp, Received
from distserve.core.messages import DecodeAssigned, DecodeWanted, Message, Prefill, Report, Status, Submit
from distserve.core.request import Request
from distserve.core.routed_prefixes import PromptKeys, RoutedPrefixes
from distserve.core.router import Router
from tests.core.harness import Deployment, make_request

SIZE = 4
CONFIG = SchedulerConfig(max_batch_size=8, headroom=0.0, prefix_caching=True)
RATE = 100.0


class Board:
    """A router of instances that have each reported once."""

    def __init__(self, *instances: str, blocks: int = 400, config: SchedulerConfig = CONFIG) -> None:
        self.router = Router()
        for name in instances:
            self.up(name, blocks, config)

    def up(self, name: str, blocks: int = 400, config: SchedulerConfig = CONFIG) -> None:
        self.feed(InstanceUp(InstanceSpec(name, Role(name.partition("-")[0]), KvConfig(blocks, SIZE), config)))
        self.report(name, free=blocks)

    def feed(self, event: Event) -> list[tuple[str, Message]]:
        commands = self.router.handle(0.0, event)
        return [(c.to, c.message) for c in commands if isinstance(c, Send) and not isinstance(c.message, Status)]

    def report(self, name: str, *, waiting: int = 0, running: int = 0, free: int = 400, **more: Any) -> None:
        self.feed(Received(name, Report(name, 0, waiting, running, free, prefill_rate=RATE, **more)))

    def route(self, one: Request) -> str:
        sent = self.feed(Received("api-0", Submit(one)))
        return next(to for to, message in sent if isinstance(message, Prefill))

    def settle(self, name: str, *seen: str, **more: Any) -> None:
        """The instance has received and done what it was given."""
        self.report(name, seen=tuple((one, 0) for one in seen), **more)

    def assign(self, one: Request, source: str = "prefill-0") -> str:
        wanted = DecodeWanted(one.key, one.owner_id, one.num_prefill_tokens, len(one.choices), one.max_total_tokens)
        sent = self.feed(Received(source, wanted))
        return next(message.decode_id for _, message in sent if isinstance(message, DecodeAssigned))


def prompt(name: str, kind: int, length: int, *, own: int = 0, **more: Any) -> Request:
    """``length`` tokens that prompts of a kind have in common, and ``own`` that no other has."""
    tokens = [*range(1000 * kind, 1000 * kind + length), *(crc32(name.encode()) * 1000 + i for i in range(own))]
    return replace(make_request(name, len(tokens)), prompt_token_ids=tuple(tokens), **more)


@pytest.mark.parametrize("role", ["prefill", "mixed"])
def test_a_prompt_follows_its_head(role: str) -> None:
    board = Board(f"{role}-0", f"{role}-1", "decode-0")
    homes = {}
    for kind in (1, 2):
        homes[kind] = board.route(prompt(f"first {kind}", kind, 40))
    assert len(set(homes.values())) == 2
    for kind, name in homes.items():
        board.settle(name, f"first {kind}")
    for turn in range(4):
        for kind, name in homes.items():
            one = prompt(f"{turn} of {kind}", kind, 40, own=5)
            assert board.route(one) == name
            board.settle(name, one.request_id)


def test_what_is_not_computed_is_no_load() -> None:
    board = Board("prefill-0", "prefill-1", "decode-0")
    home = board.route(prompt("a", 1, 40))
    board.settle(home, "a")
    assert board.route(prompt("b", 1, 40, own=4)) == home
    # 4 tokens are on their way to its home; another's 30 take no longer there than anywhere, but for these.
    other = board.route(prompt("c", 2, 30))
    assert other != home
    assert board.route(prompt("d", 1, 40, own=4)) == home


def test_a_queue_that_outweighs_the_hit_is_avoided() -> None:
    board = Board("prefill-0", "prefill-1", "decode-0")
    home = board.route(prompt("a", 1, 40))
    board.settle(home, "a", waiting=39)
    assert board.route(prompt("b", 1, 40, own=5)) == home
    board.settle(home, "b", waiting=41)
    assert board.route(prompt("c", 1, 40, own=5)) != home


def test_a_full_mixed_instance_is_not_preferred() -> None:
    for running, free in ((8, 400), (7, 3), (7, 400)):
        board = Board("mixed-0", "mixed-1")
        home = board.route(prompt("a", 1, 40))
        board.settle(home, "a", running=running, free=free)
        assert board.route(prompt("b", 1, 40, own=5)) != home, "no slot, no memory, or far more than its share"


def test_prompts_to_be_scored_are_computed_whole_wherever_they_go() -> None:
    board = Board("prefill-0", "prefill-1", "decode-0")
    home = board.route(prompt("a", 1, 40))
    board.settle(home, "a", waiting=1)
    one = prompt("b", 1, 40, own=5)
    assert board.route(replace(one, sampling=replace(one.sampling, prompt_logprobs=0))) != home


def test_salts_count() -> None:
    board = Board("prefill-0", "prefill-1", "decode-0")
    home = board.route(prompt("a", 1, 40, cache_salt="mine"))
    board.settle(home, "a", waiting=1)
    assert board.route(prompt("b", 1, 40, cache_salt="yours")) != home
    assert board.route(prompt("c", 1, 40, cache_salt="mine")) == home


def test_a_lost_instance_is_remembered_for_nothing() -> None:
    board = Board("prefill-0", "prefill-1", "decode-0")
    home = board.route(prompt("a", 1, 40))
    board.feed(InstanceLost(home))
    board.up(home)
    board.report(home, waiting=1)
    assert board.route(prompt("b", 1, 40)) != home


def test_instances_without_caching_are_chosen_by_their_wait() -> None:
    board = Board("prefill-0", "prefill-1", "decode-0", config=replace(CONFIG, prefix_caching=False))
    home = board.route(prompt("a", 1, 40))
    board.settle(home, "a", waiting=1)
    assert board.route(prompt("b", 1, 40)) != home


def test_decode_goes_to_who_was_sent_the_prompt_if_loads_are_near_equal() -> None:
    board = Board("prefill-0", "decode-0", "decode-1")
    one = prompt("a", 1, 80)
    board.route(one)
    home = board.assign(one)
    other = {"decode-0": "decode-1", "decode-1": "decode-0"}[home]
    board.settle(home, "a", running=1, free=370)
    again, third = prompt("b", 1, 80, own=5), prompt("c", 1, 80, own=5)
    board.route(again)
    assert board.assign(again) == home
    board.settle(home, "b", running=2, free=300)
    board.route(third)
    assert board.assign(third) == other


def test_a_refused_question_still_knows_its_keys() -> None:
    board = Board("prefill-0", "decode-0", "decode-1", "decode-2")
    one = prompt("a", 1, 80)
    board.route(one)
    first, second = board.assign(one), board.assign(one)
    assert {first, second} <= {"decode-0", "decode-1", "decode-2"}


@given(
    lengths=st.lists(st.tuples(st.integers(0, 3), st.sampled_from([4, 10, 200]), st.integers(0, 30)), max_size=30),
    role=st.sampled_from(["prefill", "mixed"]),
)
def test_nobody_waits_longer_than_a_hit_saves_while_another_is_idle(
    lengths: list[tuple[int, int, int]], role: str
) -> None:
    names = [f"{role}-{i}" for i in range(3)]
    board = Board(*names, "decode-0", blocks=10_000)
    waiting = dict.fromkeys(names, 0)
    for i, (kind, head, own) in enumerate(lengths):
        one = prompt(f"r{i}", kind, head, own=own)
        home = board.route(one)
        if min(waiting.values()) == 0:
            assert waiting[home] <= head
        # As if nothing were ever found: the router is told what waits, and only that.
        waiting[home] += len(one.prompt_token_ids)
        board.settle(home, one.request_id, waiting=waiting[home], free=10_000)
        busiest = max(waiting, key=lambda name: waiting[name])
        waiting[busiest] = max(0, waiting[busiest] - 50)
        board.report(busiest, waiting=waiting[busiest], free=10_000)


def test_beliefs_are_bounded_and_heads_stay() -> None:
    held = RoutedPrefixes(4)
    held.note([1, 2, 3])
    held.note([1, 2, 7, 8])
    assert len(held) == 4
    assert held.num_held([1, 2, 3]) == 2
    assert held.num_held([1, 2, 7, 8]) == 4
    held.note(list(range(10, 30)))
    assert len(held) == 4
    assert held.num_held(list(range(10, 30))) == 4


def test_keys_of_requests_are_bounded() -> None:
    keys = PromptKeys(capacity=40)
    requests = [prompt(f"r{i}", i, 40) for i in range(5)]
    for one in requests:
        assert len(keys.make(one, SIZE)) == 10
    assert [len(keys.find(one.key, SIZE)) for one in requests] == [0, 0, 10, 10, 10]
    assert keys.make(prompt("long", 9, 400), SIZE)
    assert not keys.find(("long", 0), SIZE)


@pytest.mark.parametrize("pools", [(3, 2, 0), (0, 0, 3)])
def test_with_skewed_lengths_and_a_popular_head_all_work(pools: tuple[int, int, int]) -> None:
    """Every fourth prompt is ten times as long; all begin alike, so that the first to have the head might get all."""
    prefill, decode, mixed = pools
    config = SchedulerConfig(max_batch_tokens=64, max_batch_size=16, prefix_caching=True)
    cluster = Deployment(prefill=prefill, decode=decode, mixed=mixed, kv=KvConfig(4000, SIZE), config=config)
    for i in range(120):
        one = prompt(f"r{i}", 1, 64, own=200 if i % 4 == 0 else 20)
        cluster.submit(replace(one, arrival=0.02 * i, sampling=make_request("", 1, seed=20).sampling))
    recorder = cluster.run()
    computed = [
        sum(chunk.num_tokens for step in recorder.steps(name) for chunk in step.chunks if chunk.num_tokens > 1)
        for name in cluster.schedulers
        if not name.startswith("decode")
    ]
    assert max(computed) < 1.3 * min(computed)
    hits = sum(s.totals.num_hit_tokens for name, s in cluster.schedulers.items() if not name.startswith("decode"))
    assert hits > 0.8 * 120 * 64
    cluster.assert_clean()


def test_conversations_stay_where_they_are() -> None:
    config = SchedulerConfig(max_batch_tokens=64, max_batch_size=16, prefix_caching=True)
    cluster = Deployment(prefill=2, decode=2, kv=KvConfig(2000, SIZE), config=config, remembers=True)
    for i in range(60):
        user, turn = i % 6, i // 6
        one = prompt(f"r{i}", 10 + user, 40 * (turn + 1))
        cluster.submit(replace(one, arrival=0.15 * i, sampling=make_request("", 1, seed=20 + i).sampling))
    cluster.run()
    for role in ("prefill", "decode"):
        found = [s for name, s in cluster.schedulers.items() if name.startswith(role)]
        share = sum(s.totals.num_hit_tokens for s in found) / sum(s.totals.num_queried_tokens for s in found)
        # Turns of 40, 80, .. 400 tokens: 180 of 220 were there if all turns of a user are in one place.
        assert share > 0.7, role
    cluster.assert_clean()
