"""Instances of different shapes over the NCCL transport: what arrives, against a brute-force scatter of all KV."""

import time
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from distserve.core.config import ParallelConfig
from distserve.transfer.joint import InstancePuller
from distserve.transfer.nccl.loopback import CopyExchanger, LoopbackCollectives
from distserve.transfer.nccl.room import Limits
from distserve.transfer.nccl.transport import NcclTransport
from distserve.transfer.sharded import ShardedTransport
from tests.transfer.pools import SECRET, Ended
from tests.transfer.test_sharded import (
    SHAPES,
    address_of,
    fill_ranks,
    holds,
    layout_of,
    migrate,
    migrations,
    model_kv,
    ranks_of,
)

LIMITS = Limits(min_piece_bytes=40, max_communicators=3)
"""Pieces of a block or two; fewer communicators than some ranks have peers."""


def start(stack: ExitStack, collectives, parallel: ParallelConfig, num_layers: int, num_heads: int):
    started = []
    for shard in ranks_of(parallel, num_layers, num_heads):
        layout = layout_of(shard)
        pool = torch.zeros(layout.num_bytes, dtype=torch.uint8)
        options = {"clock": time.time, "limits": LIMITS, "collectives": collectives}
        transport = NcclTransport(layout, pool, host="127.0.0.1", secret=SECRET, **options)
        started.append(ShardedTransport(transport, shard))
        stack.callback(started[-1].close)
    return started


def check(num_heads, num_layers, src, dst, src_blocks, dst_blocks) -> None:
    """Half of the blocks are ready, half follow a step that every source runs at its own pace."""
    whole = model_kv(num_layers, num_heads)
    with ExitStack() as stack:
        collectives = LoopbackCollectives(CopyExchanger)
        sources = start(stack, collectives, src, num_layers, num_heads)
        sinks = start(stack, collectives, dst, num_layers, num_heads)
        fill_ranks(sources, src, whole)
        for sink in sinks:
            sink.connect("prefill", address_of(sources, src))
        ended = Ended()
        pull = migrate(src_blocks, dst_blocks, ready=len(src_blocks) // 2)
        InstancePuller(sinks).pull(replace(pull, deadline=time.time() + 30), ended)
        for source in sources:
            source.begin_step(1)
            for layer in range(source.layout.num_layers):
                source.layer_done(1, layer)
            source.end_step(1)
        event = ended.next(40)
        assert event.ok, event.reason
        expected = np.zeros_like(whole)
        expected[:, :, list(dst_blocks)] = whole[:, :, list(src_blocks)]
        assert holds(sinks, dst, expected)
        block_tokens = sinks[0].layout.block_size * len(src_blocks)
        assert event.num_bytes == block_tokens * sum(sink.layout.token_bytes for sink in sinks)


@pytest.mark.parametrize(("src", "dst"), SHAPES)
def test_an_instance_pulls_from_one_of_another_shape(src, dst):
    check(4, 5, ParallelConfig(*src), ParallelConfig(*dst), (5, 0, 1, 3), (1, 2, 3, 0))


@pytest.mark.slow
@given(migrations())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_shapes(migration):
    check(*migration)
