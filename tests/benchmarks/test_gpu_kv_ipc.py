"""The benchmark of KV between processes on one card runs from end to end on a fake card."""

from benchmarks.gpu.kv_ipc import measure
from distserve.core.config import KvLayout
from tests.transfer.fake_device import FakeDevice

TINY = KvLayout(num_layers=2, num_blocks=12, block_size=4, num_kv_heads=2, head_dim=8, dtype="bfloat16")


def test_prompts_are_pulled_checked_and_timed():
    rows = measure(FakeDevice, TINY, ((5, 1), (5, 4)), repetitions=2)
    assert [(row.num_prompts, row.num_bytes) for row in rows] == [(1, 8 * TINY.token_bytes), (4, 32 * TINY.token_bytes)]
    assert all(row.pull_seconds > 0 and row.ratio > 0 for row in rows)
