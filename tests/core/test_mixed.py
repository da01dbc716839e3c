"""Dynamic SplitFuse as stated, and whole prompts for comparison."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from distserve.core.config import InstanceSpec, KvConfig, PrefillPolicy, Role, SchedulerConfig
from distserve.core.messages import Abort
from distserve.core.mixed import MixedScheduler
from tests.core.bench_instance import Bench
from tests.core.harness import expected_tokens, make_request


def bench(
    policy: PrefillPolicy = PrefillPolicy.SPLITFUSE,
    *,
    budget: int = 24,
    blocks: int = 400,
    size: int = 16,
    in_flight: int = 1,
    lookahead: bool = False,
) -> Bench:
    config = SchedulerConfig(
        max_batch_tokens=budget,
        max_batch_size=size,
        max_in_flight=in_flight,
        lookahead=lookahead,
        headroom=0.0,
        policy=policy,
    )
    return Bench(MixedScheduler(InstanceSpec("mixed-0", Role.MIXED, KvConfig(blocks, 4), config)))


def run_out(node: Bench, limit: int = 3000) -> None:
    while node.launched:
        node.finish_step()
        limit -= 1
        assert limit, "the scheduler does not come to an end"


WORKLOAD = st.lists(
    st.tuples(st.integers(1, 60), st.integers(0, 40), st.integers(1, 3), st.integers(0, 6)), min_size=1, max_size=10
)


@given(workload=WORKLOAD, blocks=st.integers(24, 200))
def test_every_statement_of_splitfuse_holds(workload: list[tuple[int, int, int, int]], blocks: int) -> None:
    node = bench(blocks=blocks)
    requests = []
    for i, (prompt, seed, n, delay) in enumerate(workload):
        for _ in range(delay):
            if node.launched:
                node.finish_step()
        request = make_request(f"r{i:02}", prompt, seed=seed, n=n, arrival=node.now)
        requests.append(request)
        node.submit(request)
    run_out(node)
    decoding = set(node.forked)
    for step in node.steps:
        prompts = [chunk for chunk in step.chunks if chunk.seq_id not in decoding]
        assert sum(chunk.num_tokens for chunk in step.chunks) <= 24
        assert sum(not chunk.samples for chunk in prompts) <= 1, "at most one prompt is split in a step"
        if any(not chunk.samples for chunk in prompts):
            assert sum(chunk.num_tokens for chunk in step.chunks) == 24, "a prompt is cut only to fill the budget"
        order = [chunk.seq_id in decoding for chunk in step.chunks]
        assert order == sorted(order, reverse=True), "decodes come first"
        decoding |= {chunk.seq_id for chunk in step.chunks if chunk.samples}
    for request in requests:
        for choice in request.choices:
            tokens = [o.token_id for o in node.outputs() if (o.request_id, o.choice) == (request.request_id, choice)]
            assert tokens == expected_tokens(request, choice)
    assert node.scheduler.blocks.num_free == blocks
    assert node.worker.num_open == 0


def test_the_budget_is_filled_while_admissible_prompts_wait() -> None:
    node = bench()
    for i in range(6):
        node.submit(make_request(f"r{i}", 37, seed=20, arrival=float(i)))
    run_out(node)
    filled = [sum(chunk.num_tokens for chunk in step.chunks) for step in node.steps]
    total = 6 * 37
    computed = 0
    for step, size in zip(node.steps, filled, strict=True):
        computed += sum(chunk.num_tokens for chunk in step.chunks if chunk.num_tokens > 1)
        if computed < total - 24:
            assert size == 24


def test_running_decodes_are_never_displaced_by_prompts() -> None:
    node = bench()
    node.submit(make_request("a", 8, seed=20))
    node.finish_step()
    node.submit(make_request("b", 100, seed=20, arrival=1.0))
    for _ in range(8):
        assert ("a", 1, True) in node.named(node.launched[0][0])
        node.finish_step()


def test_choices_that_fit_one_after_another_are_served() -> None:
    node = bench(blocks=11, size=4)
    request = make_request("a", 21, seed=20, max_tokens=23, n=4)
    node.submit(request)
    run_out(node)
    for choice in request.choices:
        tokens = [output.token_id for output in node.outputs() if output.choice == choice]
        assert tokens == expected_tokens(request, choice)
    assert node.scheduler.blocks.num_free == 11


def test_eviction_keeps_the_output() -> None:
    node = bench(blocks=14)
    requests = [make_request(f"r{i}", 8, seed=20, max_tokens=20, arrival=float(i)) for i in range(3)]
    for request in requests:
        node.submit(request)
    run_out(node)
    assert node.scheduler.totals.num_preempted > 0
    for request in requests:
        tokens = [output.token_id for output in node.outputs() if output.request_id == request.request_id]
        assert tokens == expected_tokens(request, 0)


def test_a_preempted_sequence_goes_on_from_the_blocks_that_are_as_it_left_them() -> None:
    # "b" gives 4 full blocks of 4 tokens back; "a" grows by one of them and ends.
    node = bench(blocks=9)
    requests = [make_request("a", 15, seed=20, max_tokens=9), make_request("b", 15, seed=20, max_tokens=9, arrival=1.0)]
    for request in requests:
        node.submit(request)
    run_out(node)
    assert node.scheduler.totals.num_preempted == 1
    assert [named for step in node.steps for named in node.named(step) if named[1] > 1][2:] == [("b", 17 - 12, True)]
    for request in requests:
        tokens = [output.token_id for output in node.outputs() if output.request_id == request.request_id]
        assert tokens == expected_tokens(request, 0)
    assert node.scheduler.blocks.num_free == 9


def test_a_prompt_that_owes_its_log_probabilities_is_recomputed_whole() -> None:
    node = bench(blocks=9)
    sampling = replace(make_request("b", 15, seed=20, max_tokens=9).sampling, prompt_logprobs=0)
    node.submit(make_request("a", 15, seed=20, max_tokens=9))
    node.submit(replace(make_request("b", 15, arrival=1.0), sampling=sampling))
    run_out(node)
    assert node.scheduler.totals.num_preempted == 1
    assert not node.forked | node.resumed


def test_lookahead_computes_a_prompt_in_consecutive_steps() -> None:
    node = bench(budget=24, in_flight=2, lookahead=True)
    node.submit(make_request("a", 40, seed=20))
    assert [node.named(step) for step, _ in node.launched] == [[("a", 24, False)], [("a", 16, True)]]


def test_lookahead_takes_memory_from_the_youngest_though_it_is_in_flight() -> None:
    node = bench(blocks=9, in_flight=2, lookahead=True)
    requests = [make_request(name, 15, seed=20, max_tokens=9, arrival=at) for name, at in (("a", 0.0), ("b", 1.0))]
    for request in requests:
        node.submit(request)
    while node.scheduler.totals.num_preempted == 0:
        node.finish_step()
    assert ("b", 1, True) in node.named(node.launched[0][0]), "its step in flight goes on"
    assert node.named(node.launched[1][0]) == [("a", 1, True)], "and nobody waits for it"
    run_out(node)
    for request in requests:
        tokens = [output.token_id for output in node.outputs() if output.request_id == request.request_id]
        assert tokens == expected_tokens(request, 0)
    assert node.scheduler.blocks.num_free == 9


def test_whole_prompts_are_never_split_nor_mixed_with_decodes() -> None:
    node = bench(PrefillPolicy.WHOLE_PROMPT)
    for i, prompt in enumerate((10, 10, 10, 60, 5)):
        node.submit(make_request(f"r{i}", prompt, seed=20, arrival=float(i)))
    run_out(node)
    for step in node.steps:
        assert all(chunk.samples for chunk in step.chunks)
    assert node.named(node.steps[0]) == [("r0", 10, True)]
    assert node.named(node.steps[1]) == [("r1", 10, True), ("r2", 10, True)]
    assert node.named(node.steps[2]) == [("r3", 60, True)], "longer than the budget: alone"
    assert node.named(node.steps[3]) == [("r4", 5, True)]
    assert len(node.named(node.steps[4])) == 5


def test_abort_frees_everything_whatever_runs() -> None:
    node = bench()
    node.submit(make_request("a", 30, n=2, seed=20))
    node.submit(make_request("b", 30, seed=20, arrival=1.0))
    for _ in range(3):
        node.finish_step()
    node.receive(Abort(("a", 0), choice=1))
    node.receive(Abort(("b", 0)))
    node.finish_step()
    assert {name for name, _, _ in node.named(node.launched[0][0])} == {"a"}
    node.receive(Abort(("a", 0)))
    run_out(node)
    assert node.scheduler.blocks.num_free == 400
