"""What the ranks of one instance say to each other during a step: sums within a stage, activations between stages.

Built on torch.distributed's process groups as objects (gloo for CPU tensors, NCCL for CUDA ones), never its global
default group: a process may hold ranks of several instances. Gloo listens where the ranks' meeting says, on the
loopback address alone where all of them share a node.
"""

from collections import deque
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from distserve.core.errors import InstanceError
from distserve.engine.sharding.meeting import LOOPBACK, Meeting
from distserve.engine.sharding.shard import Shard

c10d: Any = distributed
"""torch.distributed; its stores and groups are not typed, and NCCL's is absent from builds without CUDA."""

_SENDS_KEPT = 2
"""Activations on their way to the next stage at once; a further send waits for the oldest."""


class PeerError(InstanceError):
    """A collective failed: most likely another rank of the instance has died, and its own report tells why."""


class Communicator:
    """One rank's connections to the others of its instance. Blocking; for one thread."""

    def __init__(self, shard: Shard, meeting: Meeting, *, device: torch.device, timeout: float) -> None:
        """Meet the other ranks, who all make theirs at the same time.

        ``timeout`` is how many seconds an operation may wait for a rank that is alive but silent.

        Raises:
            PeerError: they did not come in time.
        """
        parallel = shard.parallel
        self._shard = shard
        self._sends: deque[tuple[Any, Tensor]] = deque()
        self._tp: Any = None
        self._pp: Any = None
        try:
            self._attendance = meeting.attend(shard.rank, parallel.num_ranks, timeout)
            store = self._attendance.store
            tp_store = c10d.PrefixStore(f"stage-{shard.stage}", store)
            if parallel.tp > 1:
                self._tp = make_group(tp_store, shard.index, parallel.tp, device, timeout, meeting.host)
            # Stage neighbours with the same shard index exchange activations.
            pp_store = c10d.PrefixStore(f"shard-{shard.index}", store)
            if parallel.pp > 1:
                self._pp = make_group(pp_store, shard.stage, parallel.pp, device, timeout, meeting.host)
        except RuntimeError as error:
            raise PeerError(f"the ranks of the instance did not find each other: {error}") from error

    def wait_for_all(self, point: str) -> None:
        """Return when all ranks of the instance have reached ``point``.

        Raises:
            PeerError: another rank is gone or silent.
        """
        try:
            self._attendance.wait_for_all(point)
        except RuntimeError as error:
            raise PeerError(f"the ranks of the instance are not all {point}: {error}") from error

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the stage's shards' tensors, the same to the bit on each; overwrites ``tensor``.

        Raises:
            PeerError: another rank is gone or silent.
        """
        if self._tp is None:
            return tensor
        tensor = tensor.contiguous()
        _wait(lambda group: group.allreduce([tensor]), self._tp)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """The stage's shards' tensors [..., columns] side by side, in order: [..., shards * columns].

        Raises:
            PeerError: another rank is gone or silent.
        """
        if self._tp is None:
            return tensor
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self._shard.parallel.tp)]
        _wait(lambda group: group.allgather([parts], [tensor]), self._tp)
        return torch.cat(parts, dim=-1)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """What the stage's first shard has in its ``tensor``, in everybody's, which it overwrites.

        Raises:
            PeerError: another rank is gone or silent.
        """
        if self._tp is None:
            return tensor
        options = c10d.BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        _wait(lambda group: group.broadcast([tensor], options), self._tp)
        return tensor

    def all_agree(self, is_so: bool, device: torch.device) -> bool:
        """Whether ``is_so`` on all of the stage's shards. Waits for ``device``.

        Raises:
            PeerError: another rank is gone or silent.
        """
        return int(self.sum(torch.tensor([0 if is_so else 1], device=device)).item()) == 0

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """What the stage before sent next.

        Raises:
            PeerError: another rank is gone or silent.
        """
        tensor = torch.empty(shape, dtype=dtype, device=device)
        _wait(lambda group: group.recv([tensor], self._shard.stage - 1, 0), self._pp)
        return tensor

    def send(self, tensor: Tensor) -> None:
        """Send to the next stage; returns while the tensor is still on its way, unless others are.

        Raises:
            PeerError: another rank is gone or silent.
        """
        tensor = tensor.contiguous()
        if len(self._sends) == _SENDS_KEPT:
            work, _ = self._sends.popleft()
            _wait(lambda _: work, self._pp)
        assert self._pp is not None
        try:
            self._sends.append((self._pp.send([tensor], self._shard.stage + 1, 0), tensor))
        except RuntimeError as error:
            raise PeerError(f"another rank of the instance does not answer: {error}") from error


def _wait(start: Any, group: Any) -> None:
    try:
        start(group).wait()
    except RuntimeError as error:
        raise PeerError(f"another rank of the instance does not answer: {error}") from error


def make_group(store: Any, rank: int, size: int, device: torch.device, timeout: float, host: str = LOOPBACK) -> Any:
    """Rank ``rank``'s end of a group of ``size`` that meet in ``store``: NCCL's for tensors on ``cuda``, else gloo's.

    Gloo listens at ``host`` and blocks until all are there; NCCL's ranks meet at the first operation, on the network
    that it chooses (NCCL_SOCKET_IFNAME). Raises RuntimeError, torch's own.
    """
    if device.type == "cuda":
        options = c10d.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=timeout)  # noqa: SLF001 - torch's own name for it
        return c10d.ProcessGroupNCCL(store, rank, size, options)
    options = c10d.ProcessGroupGloo._Options()  # noqa: SLF001
    options._devices = [c10d.ProcessGroupGloo.create_device(hostname=host)]  # noqa: SLF001
    options._timeout = timedelta(seconds=timeout)  # noqa: SLF001
    return c10d.ProcessGroupGloo(store, rank, size, options)
