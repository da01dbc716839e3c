"""Every statement about a mixed instance's batches, held against the commands of random runs, step by step.

What a statement is about (who runs, who waits, what memory is left) is reconstructed from the commands alone.
"""

from collections import Counter
from dataclasses import dataclass, replace

from hypothesis import event, given
from hypothesis import strategies as st

from distserve.core.commands import CloseSequence, Command, OpenSequence, RunStep
from distserve.core.config import InstanceSpec, KvConfig, PrefillPolicy, Role, SchedulerConfig
from distserve.core.mixed import MixedScheduler
from distserve.core.request import Request
from tests.core.bench_instance import Bench
from tests.core.harness import EOS, expected_tokens, make_request, token_at

BLOCK = 4


@dataclass
class Life:
    """A request of one choice, as far as the commands tell."""

    request: Request
    num_tokens: int
    num_computed: int = 0
    seq_id: int | None = None
    has_started: bool = False
    has_sampled: bool = False
    """Since it was opened last: one that is recomputed is a prompt, also with a single token left to compute."""
    has_ended: bool = False

    @property
    def age(self) -> tuple[float, str]:
        return (self.request.arrival, self.request.request_id)

    @property
    def num_output(self) -> int:
        return self.num_tokens - len(self.request.prompt_token_ids)

    @property
    def is_running(self) -> bool:
        """Past its prompt: the next token is the only one to be computed."""
        return self.seq_id is not None and self.has_sampled and not self.has_ended


class Watched(Bench):
    """Checks each step against what its commands have said so far. Prompts differ, so none shares blocks."""

    def __init__(self, policy: PrefillPolicy, *, budget: int, blocks: int, size: int) -> None:
        self.lives: dict[str, Life] = {}
        self.counts: Counter[str] = Counter()
        self.by_seq: dict[int, Life] = {}
        config = SchedulerConfig(max_batch_tokens=budget, max_batch_size=size, headroom=0.0, policy=policy)
        super().__init__(MixedScheduler(InstanceSpec("mixed-0", Role.MIXED, KvConfig(blocks, BLOCK), config)))

    def submit(self, request: Request) -> None:
        self.lives[request.request_id] = Life(request, len(request.prompt_token_ids))
        super().submit(request)

    def _take(self, commands: list[Command]) -> None:
        super()._take(commands)
        was_running = {name for name, life in self.lives.items() if life.is_running}
        evicted: set[str] = set()
        opened: list[Life] = []
        for command in commands:
            match command:
                case OpenSequence():
                    life = self.lives[command.request.request_id]
                    assert list(command.output_token_ids) == expected_tokens(life.request, 0)[: life.num_output]
                    assert command.num_computed_tokens % BLOCK == 0, "it goes on from whole blocks"
                    assert command.num_computed_tokens == 0 or life.has_started
                    self.counts["recomputed"] += life.has_started
                    life.seq_id, life.num_computed = command.seq_id, command.num_computed_tokens
                    life.has_started, life.has_sampled = True, False
                    self.by_seq[command.seq_id] = life
                    opened.append(life)
                case CloseSequence(seq_id):
                    life = self.by_seq.pop(seq_id)
                    life.seq_id = None
                    if not life.has_ended:
                        self.counts["evicted"] += 1
                        evicted.add(life.request.request_id)
                case RunStep():
                    self.check(command, was_running - evicted, opened, has_evicted=bool(evicted))

    def check(self, step: RunStep, running: set[str], opened: list[Life], *, has_evicted: bool) -> None:
        config, kv = self.scheduler.spec.scheduler, self.scheduler.spec.kv
        budget = config.max_batch_tokens
        decodes, prompts = [], []
        for chunk in step.chunks:
            life = self.by_seq[chunk.seq_id]
            (decodes if life.request.request_id in running else prompts).append((life, chunk))
        total = sum(chunk.num_tokens for chunk in step.chunks)
        order = [self.by_seq[chunk.seq_id].request.request_id in running for chunk in step.chunks]
        for _, chunk in decodes:
            assert chunk.num_tokens == 1
            assert chunk.samples
        split = [(life, chunk) for life, chunk in prompts if not chunk.samples]
        waits_after = [life for life in self.lives.values() if not (life.has_ended or life.is_running)]
        for life, chunk in prompts:
            assert life.num_computed + chunk.num_tokens <= life.num_tokens
            assert chunk.samples == (life.num_computed + chunk.num_tokens == life.num_tokens), (
                "only a last chunk samples"
            )
            if chunk.samples:
                waits_after.remove(life)
        started = [life for life in waits_after if life.seq_id is not None]
        unstarted = sorted((life for life in waits_after if life.seq_id is None), key=lambda life: life.age)
        num_held = sum(life.seq_id is not None for life in self.lives.values())
        head_fits = bool(unstarted) and (
            kv.blocks_to_admit(unstarted[0].num_tokens, 1) <= self.scheduler.blocks.num_free
            and num_held + 1 <= config.max_batch_size
        )
        if config.policy is PrefillPolicy.SPLITFUSE:
            assert total <= budget
            assert {life.request.request_id for life, _ in decodes} == running, "decodes are never displaced"
            assert order == sorted(order, reverse=True), "decodes come first"
            assert len(split) <= 1, "at most one prompt is split"
            assert not split or split[0][1] is step.chunks[-1], "the last one"
            if total < budget:
                assert not started, "a prompt that has started is never cut short of the budget"
                assert not head_fits, "the budget is filled while an admissible prompt waits"
            else:
                self.counts["filled"] += 1
        else:
            assert not split, "prompts are never split"
            assert not (decodes and prompts), "prompts and decodes are apart"
            assert not started
            if prompts:
                assert total <= budget or len(prompts) == 1
            else:
                assert {life.request.request_id for life, _ in decodes} == running
                assert has_evicted or not head_fits, "prompts go before any decoding"
        self.counts["split"] += len(split)
        self.counts["composed"] += len(prompts) > 1
        fresh = [life for life, _ in prompts if life in opened]
        assert fresh == [life for life, _ in prompts][len(prompts) - len(fresh) :], "those that have started precede"
        assert fresh == opened == sorted(fresh, key=lambda life: life.age), "the others in order of arrival"
        assert all(life.age < other.age for life in opened for other in unstarted), "nobody is overtaken"
        for life, chunk in (*decodes, *prompts):
            life.num_computed += chunk.num_tokens
            life.has_sampled = chunk.samples
            if chunk.samples:
                token = token_at(life.request, 0, life.num_output)
                life.num_tokens += 1
                life.has_ended = token == EOS or life.num_output == life.request.sampling.max_tokens


WORKLOAD = st.lists(
    st.tuples(st.integers(1, 70), st.integers(0, 40), st.integers(1, 30), st.integers(0, 6)), min_size=1, max_size=12
)


@given(
    workload=WORKLOAD,
    policy=st.sampled_from(PrefillPolicy),
    budget=st.integers(8, 40),
    size=st.integers(1, 8),
    blocks=st.integers(26, 90),
)
def test_every_statement_holds_in_every_step(
    workload: list[tuple[int, int, int, int]], policy: PrefillPolicy, budget: int, size: int, blocks: int
) -> None:
    node = Watched(policy, budget=budget, blocks=blocks, size=size)
    for i, (prompt, seed, max_tokens, delay) in enumerate(workload):
        for _ in range(delay):
            if node.launched:
                node.finish_step()
        request = make_request(f"r{i:02}", prompt, seed=seed, max_tokens=max_tokens, arrival=node.now)
        node.submit(replace(request, prompt_token_ids=range(1000 * i, 1000 * i + prompt)))
    for _ in range(5000):
        if not node.launched:
            break
        node.finish_step()
    assert not node.launched, "the scheduler does not come to an end"
    for name, life in node.lives.items():
        tokens = [output.token_id for output in node.outputs() if output.request_id == name]
        assert tokens == expected_tokens(life.request, 0), "also of those that were evicted and recomputed"
    assert node.counts["evicted"] == node.scheduler.totals.num_preempted == node.counts["recomputed"]
    assert node.scheduler.blocks.num_free == blocks
    for name in ("evicted", "split", "composed", "filled"):
        event(f"{policy}: {name}: {node.counts[name] > 0}")


def test_the_runs_see_what_the_statements_are_about() -> None:
    node = Watched(PrefillPolicy.SPLITFUSE, budget=16, blocks=30, size=8)
    for i in range(10):
        request = make_request(f"r{i:02}", 3 + 5 * i, seed=20, max_tokens=20, arrival=float(i))
        node.submit(replace(request, prompt_token_ids=range(1000 * i, 1000 * i + 3 + 5 * i)))
    while node.launched:
        node.finish_step()
    assert all(node.counts[name] > 0 for name in ("evicted", "recomputed", "split", "composed", "filled"))
