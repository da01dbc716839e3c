"""On a GPU: no operation makes the host wait, and all can be captured in a graph and replayed on other inputs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import distserve_kernels as kernels
from tests.kernels.gpu.checking import random
from tests.kernels.paged_batches import make_batch

pytestmark = pytest.mark.gpu


def decode() -> tuple[Callable[..., Tensor], list[Tensor]]:
    batch = make_batch(
        [(700, 1), (40, 1)], num_heads=8, num_kv_heads=2, head_dim=64, block_size=16, dtype=torch.bfloat16, seed=0
    )
    rest = [tensor.cuda() for tensor in batch.arguments()[1:]]
    return lambda q: kernels.paged_attention(q, *rest, scale=0.1), [batch.q]


def mixed() -> tuple[Callable[..., Tensor], list[Tensor]]:
    batch = make_batch(
        [(70, 1), (40, 9)], num_heads=8, num_kv_heads=2, head_dim=64, block_size=16, dtype=torch.bfloat16, seed=0
    )
    rest = [tensor.cuda() for tensor in batch.arguments()[1:]]
    return lambda q: kernels.paged_attention(q, *rest, scale=0.1), [batch.q]


def rotary_write() -> tuple[Callable[..., Tensor], list[Tensor]]:
    caches = torch.zeros(2, 2, 16, 2, 64, device="cuda", dtype=torch.bfloat16)

    def call(qkv: Tensor, angles: Tensor, slots: Tensor) -> Tensor:
        q = kernels.rope_and_write_kv(qkv, angles.cos(), angles.sin(), caches[0], caches[1], slots, 4)
        kernels.write_kv(q[:, :2], q[:, 2:], caches[0], caches[1], slots + 1)
        return torch.cat([q.flatten(), caches.flatten()])

    qkv = random(3, 8 * 64, dtype=torch.bfloat16, seed=1)
    return call, [qkv, random(3, 64, dtype=torch.float32, seed=2), torch.tensor([4, 2, 20])]


def rows() -> tuple[Callable[..., Tensor], list[Tensor]]:
    def call(x: Tensor, residual: Tensor) -> Tensor:
        normed = kernels.add_rms_norm(x, residual.clone(), x[0], 1e-5)
        return kernels.silu_mul(kernels.rms_norm(normed, x[1], 1e-5))

    return call, [*random(2, 4, 128, dtype=torch.bfloat16, seed=3)]


def mixture() -> tuple[Callable[..., Tensor], list[Tensor]]:
    weights = random(4, 32, 64, dtype=torch.bfloat16, seed=4).cuda()

    def call(x: Tensor, expert_ids: Tensor) -> Tensor:
        order, starts = kernels.sort_by_expert(expert_ids, 4)
        return kernels.grouped_matmul(x[order], weights, starts)

    return call, [random(6, 64, dtype=torch.bfloat16, seed=5), torch.tensor([3, 0, 3, 1, 1, 3])]


def migration() -> tuple[Callable[..., Tensor], list[Tensor]]:
    pool = random(2, 2, 6, 16, 2, 64, dtype=torch.bfloat16, seed=6).cuda()

    def call(blocks: Tensor) -> Tensor:
        target = torch.zeros_like(pool)
        kernels.unpack_kv(kernels.pack_kv(pool, blocks, range(2), range(1, 2)), target, blocks, range(2), range(1))
        return target

    return call, [torch.tensor([3, 0, 5])]


def draw() -> tuple[Callable[..., Tensor], list[Tensor]]:
    def call(weights: Tensor, seeds: Tensor) -> Tensor:
        return kernels.race_draw(weights, kernels.philox_keys(seeds, seeds * 0, seeds + 1))

    return call, [torch.rand(3, 9000), torch.tensor([1, 2**40, -5])]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("operation", [decode, mixed, rotary_write, rows, mixture, migration, draw])
def test_captured_and_replayed_without_the_host_waiting(operation):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    call, inputs = operation()
    inputs = [tensor.cuda() for tensor in inputs]
    others = [tensor.flip(0) for tensor in inputs]
    expected = call(*others).clone()
    call(*inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(*inputs)
    for tensor, other in zip(inputs, others, strict=True):
        tensor.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    if operation is rotary_write:
        # The caches also keep what earlier calls stored, at other slots: the queries are compared.
        assert torch.equal(captured[: 3 * 4 * 64], expected[: 3 * 4 * 64])
    else:
        assert torch.equal(captured, expected)
