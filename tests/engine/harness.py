"""A minimal driver of a Worker: hands out blocks, makes steps, keeps the tokens. No scheduler, no policy."""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from distserve.core.commands import Chunk, OpenSequence, RunStep, TableUpdate
from distserve.core.events import StepDone
from distserve.core.request import Request, SamplingParams, TokenLogprobs
from distserve.engine.worker import Worker


def make_request(prompt: Sequence[int], choices: tuple[int, ...] = (0,), **sampling: object) -> Request:
    params = {"max_tokens": 64, "temperature": 0.0, **sampling}
    return Request("r", "owner", tuple(prompt), SamplingParams(**params), choices=choices)


@dataclass
class Track:
    """A sequence under way: what the harness knows of it."""

    seq_id: int
    request: Request
    num_computed: int
    blocks: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt_token_ids) + len(self.output)


class Harness:
    """Drives ``worker``; blocks are handed out in a shuffled order so that tables are never the identity."""

    def __init__(self, worker: Worker, seed: int = 0) -> None:
        self.worker = worker
        self.free = list(range(worker.layout.num_blocks))
        random.Random(seed).shuffle(self.free)
        self.next_id = 1
        self.step_id = 0
        self.updates: list[TableUpdate] = []
        self.copies: list[tuple[int, int]] = []
        self.chunks: tuple[Chunk, ...] = ()

    def open(self, request: Request, output: Iterable[int] = (), num_computed: int = 0) -> Track:
        track = Track(self.next_id, request, num_computed, output=list(output))
        self.next_id += 1
        command = OpenSequence(track.seq_id, request, request.choices, tuple(track.output), num_computed)
        self.worker.open(command)
        self._grow(track, num_computed)
        return track

    def close(self, track: Track) -> None:
        self.worker.close(track.seq_id)
        self.free.extend(track.blocks)

    def _grow(self, track: Track, num_tokens: int) -> None:
        needed = -(-num_tokens // self.worker.layout.block_size) - len(track.blocks)
        if needed > 0:
            blocks = tuple(self.free.pop() for _ in range(needed))
            self.updates.append(TableUpdate(track.seq_id, len(track.blocks), blocks))
            track.blocks.extend(blocks)

    def step(self, *work: tuple[Track, int], on_layer: Callable[[int], None] | None = None) -> StepDone:
        """Compute so many tokens of each track; those that reach their end are sampled."""
        chunks = []
        for track, num_tokens in work:
            end = track.num_computed + num_tokens
            assert num_tokens > 0
            assert end <= track.num_tokens
            self._grow(track, end)
            chunks.append(Chunk(track.seq_id, num_tokens, end == track.num_tokens))
        if tuple(chunks) != self.chunks:
            self.chunks = tuple(chunks)
        self.step_id += 1
        step = RunStep(self.step_id, self.chunks, tuple(self.updates), tuple(self.copies))
        self.updates, self.copies = [], []
        done = self.worker.run(step, on_layer)
        assert done.step_id == self.step_id
        tokens = list(done.tokens)
        logprobs = list(done.logprobs or [None] * len(tokens))
        by_id = dict(done.prompt_logprobs)
        for (track, num_tokens), chunk in zip(work, self.chunks, strict=True):
            track.num_computed += num_tokens
            track.prompt_logprobs.extend(by_id.get(track.seq_id, ()))
            if chunk.samples:
                for _ in track.request.choices:
                    track.output.append(tokens.pop(0))
                    track.logprobs.append(logprobs.pop(0))
        assert not tokens
        return done

    def prefill(self, track: Track, chunk: int | None = None) -> None:
        """Compute all that is known of a track in chunks of ``chunk`` tokens (whole by default) and sample once."""
        end = track.num_tokens
        while track.num_computed < end:
            left = end - track.num_computed
            self.step((track, min(left, chunk or left)))

    def decode(self, tracks: Sequence[Track], num_steps: int) -> None:
        for _ in range(num_steps):
            self.step(*((track, 1) for track in tracks))

    def generate(self, request: Request, num_tokens: int, chunk: int | None = None) -> Track:
        track = self.open(request)
        self.prefill(track, chunk)
        self.decode([track], num_tokens - 1)
        self.close(track)
        return track

    def migrate(self, track: Track, target: "Harness") -> Track:
        """Copy a track's KV into another harness's pool, as a transfer would, and go on there."""
        moved = target.open(replace(track.request), track.output, track.num_computed)
        source, destination = self.worker.kv.blocks, target.worker.kv.blocks
        destination[:, :, moved.blocks] = source[:, :, track.blocks]
        self.close(track)
        return moved


def generate_while_blocks_move(worker: Worker, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """Greedy texts of prompts in a batch that stays as it is; before each step one block has become another.

    As copy on write has it: a block is copied, the table follows, also in entries already used, and what was in the
    old one is of no use any more.
    """
    harness = Harness(worker)
    tracks = [harness.open(make_request(prompt)) for prompt in prompts]
    for track in tracks:
        harness.prefill(track)
    for step in range(num_tokens - 1):
        track = tracks[step % len(tracks)]
        place = step % len(track.blocks)
        old, new = track.blocks[place], harness.free.pop(0)
        harness.copies.append((old, new))
        harness.updates.append(TableUpdate(track.seq_id, place, (new,)))
        track.blocks[place] = new
        harness.decode(tracks, 1)
        worker.kv.blocks[:, :, old] = 1e3
        harness.free.append(old)
    for track in tracks:
        harness.close(track)
    return [track.output for track in tracks]


def generate_side_by_side(worker: Worker, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """Greedy texts of four prompts, some in chunks, one beside decoding sequences; they decode together in the end."""
    harness = Harness(worker)
    first, second, third, fourth = tracks = [harness.open(make_request(prompt)) for prompt in prompts]
    harness.prefill(first)
    harness.prefill(second, 5)
    # A prompt beside decoding sequences, then several rungs of the graphs' ladder, some of them with padding.
    harness.step((first, 1), (third, third.num_tokens), (second, 1))
    harness.prefill(fourth, 7)
    while open_tracks := [track for track in tracks if len(track.output) < num_tokens]:
        harness.decode(open_tracks, 1)
    return [track.output for track in tracks]
