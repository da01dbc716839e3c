"""A rank in a process of its own, driven line by line: run by ``conftest.py``.

Reads JSON commands from standard input, writes one JSON line per answer or ended pull.
"""

import json
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from distserve.core.errors import TransferError
from distserve.transfer.shm import ShmTransport
from distserve.transfer.tcp import TcpTransport
from tests.transfer.pools import LAYOUT, SECRET, fill, migrate

_output = threading.Lock()


def say(**line: object) -> None:
    with _output:
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


def main() -> None:
    options = json.loads(sys.argv[1])
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
    say(address=transport.address)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            if name == "pull":
                pull_id, src_blocks, dst_blocks, ready, step = arguments
                transport.pull(
                    migrate(pull_id, src_blocks, dst_blocks, ready=ready, step=step, deadline=time.time() + 60),
                    lambda event: say(**asdict(event)),
                )
            else:
                getattr(transport, name)(*arguments)
            say(returned=name)
        except TransferError as error:
            say(error=str(error))


if __name__ == "__main__":
    main()
