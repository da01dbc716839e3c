"""What a scheduler can rely on when it drives a worker."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from distserve.core.commands import Chunk, OpenSequence, RunStep, TableUpdate
from distserve.core.events import NOT_FINITE
from distserve.core.request import TokenLogprobs
from distserve.engine import fused
from distserve.engine.inputs import StepInputs
from distserve.engine.worker import Worker
from tests.engine.conftest import NUM_TOKENS, Served
from tests.engine.harness import Harness, Track, generate_while_blocks_move, make_request

SAMPLED = {"temperature": 1.0, "seed": 11, "top_p": 0.95, "frequency_penalty": 0.3, "presence_penalty": 0.2}


@pytest.fixture(scope="module")
def reference_logprobs(llama: Served) -> torch.Tensor:
    """transformers' log-probabilities over prompt 2 and its expected text."""
    model = AutoModelForCausalLM.from_pretrained(llama.path)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([llama.prompts[2] + llama.expected[2]])).logits[0]
    return logits.log_softmax(-1)


def assert_same(entries: list[TokenLogprobs | None], tokens: list[int], expected: torch.Tensor, num_top: int) -> None:
    """``expected[i]`` are the log-probabilities that ``tokens[i]`` was chosen from."""
    assert len(entries) == len(tokens) == len(expected)
    for entry, token, row in zip(entries, tokens, expected, strict=True):
        assert entry is not None
        assert entry.logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert entry.rank == 1 + int((row > row[token]).sum())
        assert [i for i, _ in entry.top] == row.topk(num_top).indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(row.topk(num_top).values.tolist(), abs=1e-4)


def test_logprobs_from_the_first_token_on(
    llama: Served, llama_worker: Worker, reference_logprobs: torch.Tensor
) -> None:
    prompt = llama.prompts[2]
    track = Harness(llama_worker).generate(make_request(prompt, logprobs=3), NUM_TOKENS)
    assert_same(track.logprobs, llama.expected[2], reference_logprobs[len(prompt) - 1 : -1], 3)


@pytest.mark.parametrize("chunk", [None, 1, 4, 30])
def test_prompt_logprobs(
    llama: Served, llama_worker: Worker, reference_logprobs: torch.Tensor, chunk: int | None
) -> None:
    prompt = llama.prompts[2]
    harness = Harness(llama_worker)
    track = harness.open(make_request(prompt, prompt_logprobs=2))
    beside = harness.open(make_request(llama.prompts[3], prompt_logprobs=0))
    harness.step((beside, 3))
    harness.prefill(track, chunk)
    assert_same(list(track.prompt_logprobs), prompt[1:], reference_logprobs[: len(prompt) - 1], 2)
    harness.decode([track], 2)
    assert len(track.prompt_logprobs) == len(prompt) - 1
    harness.prefill(beside)
    assert len(beside.prompt_logprobs) == len(llama.prompts[3]) - 1
    assert all(entry.top == () for entry in beside.prompt_logprobs)
    assert track.output == llama.expected[2][:3]
    for each in (track, beside):
        harness.close(each)


def test_prompt_logprobs_of_prompts_side_by_side(llama: Served, llama_worker: Worker) -> None:
    """As many logits as tokens, in another order: the prompts' own come before those that tokens are drawn from."""
    harness = Harness(llama_worker)
    tracks = [harness.open(make_request(prompt, prompt_logprobs=0)) for prompt in llama.prompts[:3]]
    alone = harness.open(make_request(llama.prompts[1], prompt_logprobs=0))
    harness.prefill(alone)
    harness.step(*((track, track.num_tokens) for track in tracks[:2]))
    # A token of a prompt behind one that is drawn.
    harness.step((tracks[0], 1), (tracks[2], 1))
    harness.prefill(tracks[2])
    assert [track.output for track in tracks] == [llama.expected[0][:2], llama.expected[1][:1], llama.expected[2][:1]]
    assert [e.logprob for e in tracks[1].prompt_logprobs] == pytest.approx([e.logprob for e in alone.prompt_logprobs])
    for track in (*tracks, alone):
        harness.close(track)


def test_the_seed_gives_the_text_whatever_is_beside_it(llama: Served, llama_worker: Worker) -> None:
    requests = [make_request(p, **{**SAMPLED, "seed": seed}) for seed, p in enumerate(llama.prompts)]
    harness = Harness(llama_worker)
    alone = [harness.generate(request, 20).output for request in requests]
    assert len(set(map(tuple, alone))) == len(alone)
    tracks = [harness.open(request) for request in requests]
    greedy = harness.open(make_request(llama.prompts[1]))
    for track in tracks:
        harness.prefill(track, 6)
    harness.step((greedy, greedy.num_tokens), *((track, 1) for track in tracks[::-1]))
    harness.decode([tracks[1], greedy, tracks[0]], 5)
    while any(len(track.output) < 20 for track in tracks):
        harness.decode([track for track in tracks if len(track.output) < 20], 1)
    assert [track.output for track in tracks] == alone
    assert greedy.output == llama.expected[1][:6]
    for track in [*tracks, greedy]:
        harness.close(track)


def test_other_seeds_give_other_texts(llama: Served, llama_worker: Worker) -> None:
    harness = Harness(llama_worker)
    texts = {
        tuple(harness.generate(make_request(llama.prompts[0], **{**SAMPLED, "seed": seed}), 12).output)
        for seed in range(8)
    }
    assert len(texts) == 8


def test_sampled_text_survives_migration_and_preemption(llama: Served, llama_worker: Worker) -> None:
    request = make_request(llama.prompts[1], **SAMPLED, min_tokens=8, stop_token_ids=(5, 9), repetition_penalty=1.1)
    harness, target = Harness(llama_worker), Harness(llama.worker(num_blocks=40), seed=3)
    expected = harness.generate(request, 20).output
    track = harness.open(request)
    harness.prefill(track)
    harness.decode([track], 4)
    moved = harness.migrate(track, target)
    target.decode([moved], 6)
    target.close(moved)
    # As its owner resubmits it: the tokens it has are part of the request.
    resubmitted = replace(request, attempt=1, output_token_ids=tuple(moved.output))
    again = harness.open(resubmitted, output=moved.output)
    harness.prefill(again, 5)
    harness.decode([again], 20 - len(again.output))
    harness.close(again)
    assert again.output == expected


def test_choices_of_one_prompt_are_drawn_each_with_its_own_numbers(llama: Served, llama_worker: Worker) -> None:
    harness = Harness(llama_worker)
    separate = [
        harness.generate(make_request(llama.prompts[2], choices=(choice,), **SAMPLED), 10).output for choice in range(4)
    ]
    assert len(set(map(tuple, separate))) == 4
    first = harness.open(make_request(llama.prompts[2], choices=(0, 1, 2, 3), **SAMPLED, logprobs=1))
    beside = harness.open(make_request(llama.prompts[1]))
    harness.step((first, 20))
    harness.step((first, first.num_tokens - 20), (beside, beside.num_tokens))
    assert first.output == [text[0] for text in separate]
    assert all(entry is not None for entry in first.logprobs)
    assert beside.output == llama.expected[1][:1]
    # The choices go on from copies of the prompt's KV, as a fork on the decode side makes them.
    forks = []
    for choice, token in enumerate(first.output):
        fork = harness.open(
            make_request(llama.prompts[2], choices=(choice,), **SAMPLED), [token], num_computed=len(llama.prompts[2])
        )
        harness.copies += zip(first.blocks, fork.blocks, strict=True)
        forks.append(fork)
    harness.decode(forks, 9)
    assert [fork.output for fork in forks] == separate
    for track in [first, beside, *forks]:
        harness.close(track)


def test_layers_are_announced_in_order_once_their_kv_is_written(llama: Served, llama_worker: Worker) -> None:
    harness = Harness(llama_worker)
    track = harness.open(make_request(llama.prompts[3]))
    pool = llama_worker.kv
    pool.blocks.zero_()
    seen: list[tuple[int, int]] = []

    def on_layer(layer: int) -> None:
        written = pool.blocks[layer].abs().sum((0, 3, 4))
        seen.append((layer, int((written > 0).sum())))

    harness.step((track, 9), on_layer=on_layer)
    harness.step((track, track.num_tokens - 9), on_layer=on_layer)
    harness.step((track, 1), on_layer=on_layer)
    length = len(llama.prompts[3])
    assert seen == [(layer, count) for count in (9, length, length + 1) for layer in range(3)]
    harness.close(track)


def test_a_sequence_with_bad_logits_does_not_harm_the_others(
    llama: Served, llama_worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness(llama_worker)
    tracks = [harness.open(make_request(prompt)) for prompt in llama.prompts[:3]]
    for track in tracks:
        harness.prefill(track)
    model = llama_worker._model

    def damaged(inputs: StepInputs, on_layer: object) -> torch.Tensor:
        logits = model(inputs, None)
        logits[1] = torch.nan
        return logits

    monkeypatch.setattr(llama_worker, "_model", damaged)
    harness.decode(tracks, 1)
    monkeypatch.undo()
    assert tracks[1].output[-1] == NOT_FINITE
    # A step that was launched ahead still holds the sequence.
    harness.decode(tracks, 1)
    harness.close(tracks[1])
    harness.decode([tracks[0], tracks[2]], 4)
    assert tracks[0].output == llama.expected[0][:7]
    assert tracks[2].output == llama.expected[2][:7]
    harness.close(tracks[0])
    harness.close(tracks[2])


def test_tables_may_change_while_a_decode_batch_repeats(llama: Served, llama_worker: Worker) -> None:
    assert generate_while_blocks_move(llama_worker, llama.prompts, NUM_TOKENS) == llama.expected


def test_a_table_may_be_longer_than_the_sequence(llama: Served, llama_worker: Worker) -> None:
    harness = Harness(llama_worker)
    tracks = [harness.open(make_request(prompt, max_tokens=NUM_TOKENS)) for prompt in llama.prompts[:2]]
    for track in tracks:
        harness.prefill(track)
    harness.decode(tracks, 3)
    track = tracks[1]
    more = tuple(harness.free.pop() for _ in range(30))
    harness.updates.append(TableUpdate(track.seq_id, len(track.blocks), more))
    track.blocks.extend(more)
    harness.decode(tracks, NUM_TOKENS - 4)
    assert [t.output for t in tracks] == llama.expected[:2]
    for t in tracks:
        harness.close(t)


def test_positions_past_the_first_rotary_table(llama: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_FIRST_POSITIONS", 8)
    harness = Harness(llama.worker())
    for prompt, expected in zip(llama.prompts, llama.expected, strict=True):
        assert harness.generate(make_request(prompt), NUM_TOKENS, 7).output == expected


def test_equal_chunks_in_another_tuple_are_the_same_batch(llama: Served, llama_worker: Worker) -> None:
    """A step's identity may be lost on its way to another process."""
    harness = Harness(llama_worker)
    track = harness.open(make_request(llama.prompts[0]))
    harness.prefill(track)
    for _ in range(NUM_TOKENS - 1):
        harness.chunks = ()
        harness.decode([track], 1)
    assert track.output == llama.expected[0]
    harness.close(track)


def test_a_step_may_hold_copies_alone(llama_worker: Worker) -> None:
    llama_worker.kv.blocks[:, :, 3] = 7.0
    done = llama_worker.run(RunStep(1, (), copies=((3, 4),)))
    assert done.tokens == ()
    assert bool((llama_worker.kv.blocks[:, :, 4] == 7.0).all())


def test_a_sequence_may_overrun_its_limit_by_one(llama: Served, llama_worker: Worker) -> None:
    """A step launched before the last token was known computes one too many."""
    harness = Harness(llama_worker)
    track = harness.open(make_request(llama.prompts[0], max_tokens=5))
    harness.prefill(track)
    harness.decode([track], 5)
    assert track.output == llama.expected[0][:6]
    harness.close(track)


def test_a_failed_step_leaves_the_worker_usable(llama: Served, llama_worker: Worker) -> None:
    harness = Harness(llama_worker)
    bad = make_request([10**9])
    llama_worker.open(OpenSequence(10_000, bad, (0,), (), 0))
    with pytest.raises((IndexError, RuntimeError)):
        llama_worker.run(RunStep(1, (Chunk(10_000, 1, samples=True),), (TableUpdate(10_000, 0, (0,)),)))
    llama_worker.close(10_000)
    track: Track = harness.generate(make_request(llama.prompts[0]), NUM_TOKENS)
    assert track.output == llama.expected[0]
