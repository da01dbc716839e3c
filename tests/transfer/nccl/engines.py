"""Ranks with an engine: the pool that a real prefill writes and a real decode reads, moved by the NCCL transport."""

import time

import torch

from distserve.core.config import KvConfig
from distserve.engine.description import describe
from distserve.engine.worker import Worker
from distserve.transfer.nccl.collectives import Collectives
from distserve.transfer.nccl.room import Limits
from distserve.transfer.nccl.sockets import SocketCollectives
from distserve.transfer.nccl.transport import NcclTransport
from tests.engine.harness import Harness, Track
from tests.transfer.pools import SECRET

KV = KvConfig(num_blocks=48, block_size=4)
LIMITS = Limits(min_piece_bytes=4096)
"""Small enough that a prompt of a tiny model is several pieces."""


class EngineRank:
    """On ``device``, "cpu" or "cuda". By default communicators are NCCL's on a card, and sockets' on a CPU."""

    def __init__(self, model: str, device: str, collectives: Collectives | None = None) -> None:
        layout = describe(model).layout(KV, "float32")
        self.pool = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=device)
        if collectives is None and device == "cpu":
            collectives = SocketCollectives()
        self.transport = NcclTransport(
            layout,
            self.pool,
            host="127.0.0.1",
            secret=SECRET,
            clock=time.time,
            limits=LIMITS,
            collectives=collectives,
        )
        self.harness = Harness(Worker(model, kv=KV, kv_buffer=self.pool, device=device))

    def open(self, request) -> Track:
        track = self.harness.open(request)
        self.harness._grow(track, len(request.prompt_token_ids))
        return track

    def reserve(self, num_tokens: int) -> list[int]:
        """Blocks for KV to arrive in, which :meth:`go_on` hands to the sequence."""
        return [self.harness.free.pop() for _ in range(-(-num_tokens // KV.block_size))]

    def go_on(self, request, first: int, blocks: list[int]) -> Track:
        self.harness.free.extend(reversed(blocks))
        track = self.harness.open(request, [first], len(request.prompt_token_ids))
        assert track.blocks == blocks
        return track

    def compute(self, track: Track, num_tokens: int) -> list[int]:
        """A step of the prompt, announced layer by layer as an engine does."""
        step_id = self.harness.step_id + 1
        self.transport.begin_step(step_id)
        done = self.harness.step(
            (track, num_tokens), on_layer=lambda layer: self.transport.layer_done(step_id, layer)
        )  # fmt: skip
        self.transport.end_step(step_id)
        return list(done.tokens)
