"""A rank in a process of its own: run by ``conftest.py``. Says an answer to each command, and pulls that ended."""

import time
from dataclasses import asdict, replace

from distserve.core.errors import TransferError
from distserve.transfer.shm import ShmTransport
from distserve.transfer.tcp import TcpTransport
from tests.peers import Line
from tests.transfer.fake_device import FakeGpuTransport
from tests.transfer.pools import LAYOUT, SECRET, fill, migrate


def main(
    line: Line, transport: str = "shm", *, layout=(), secret=SECRET, seed: int = 0, patience: float = 20.0
) -> None:
    layout = replace(LAYOUT, **dict(layout))
    if transport == "tcp":
        rank = TcpTransport(layout, host="127.0.0.1", secret=secret, clock=time.time)
    elif transport == "cuda_ipc":
        rank = FakeGpuTransport(layout, secret=secret, clock=time.time, patience=patience)
    else:
        rank = ShmTransport(layout, secret=secret, clock=time.time)
    fill(rank.buffer, layout, seed)
    line.say(rank.address)
    for name, *arguments in line.commands():
        try:
            if name == "pull":
                pull_id, src_blocks, dst_blocks, ready, step = arguments
                rank.pull(
                    migrate(pull_id, src_blocks, dst_blocks, ready=ready, step=step, deadline=time.time() + 60),
                    lambda event: line.say(asdict(event)),
                )
            else:
                getattr(rank, name)(*arguments)
            line.say({"returned": name})
        except TransferError as error:
            line.say({"error": str(error)})
