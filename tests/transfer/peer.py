"""A rank in a process of its own: run by ``conftest.py``. Says one line per answer or ended pull."""

import time
from dataclasses import asdict, replace

from distserve.core.errors import TransferError
from distserve.transfer.shm import ShmTransport
from distserve.transfer.tcp import TcpTransport
from tests import peers
from tests.transfer.pools import LAYOUT, SECRET, fill, migrate


def main() -> None:
    options = peers.options()
    layout = replace(LAYOUT, **options.get("layout", {}))
    secret = options["secret"].encode() if "secret" in options else SECRET
    if options.get("transport") == "tcp":
        transport = TcpTransport(layout, host="127.0.0.1", secret=secret, clock=time.time)
    elif options.get("transport") == "cuda_ipc":
        from tests.transfer.fake_device import FakeGpuTransport  # imports torch

        patience = options.get("patience", 20.0)
        transport = FakeGpuTransport(layout, secret=secret, clock=time.time, patience=patience)
    else:
        transport = ShmTransport(layout, secret=secret, clock=time.time)
    fill(transport.buffer, layout, options.get("seed", 0))
    peers.say({"address": transport.address})
    for name, *arguments in peers.commands():
        try:
            if name == "pull":
                pull_id, src_blocks, dst_blocks, ready, step = arguments
                transport.pull(
                    migrate(pull_id, src_blocks, dst_blocks, ready=ready, step=step, deadline=time.time() + 60),
                    lambda event: peers.say(asdict(event)),
                )
            else:
                getattr(transport, name)(*arguments)
            peers.say({"returned": name})
        except TransferError as error:
            peers.say({"error": str(error)})


if __name__ == "__main__":
    main()
