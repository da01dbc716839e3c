"""A rank that uses NCCL, in a process of its own, driven line by line: filled blocks, or an engine that prefills.

On a CPU with communicators over sockets, on a card with NCCL's. Reads JSON commands from standard input, writes one
JSON line per answer or ended pull.
"""

import json
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))
sys.path.insert(0, str(Path(__file__).parents[3] / "kernels"))

from tests.transfer.nccl.ranks import Rank
from tests.transfer.pools import migrate

_output = threading.Lock()


def say(**line: object) -> None:
    with _output:
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


def main() -> None:
    options = json.loads(sys.argv[1])
    if "model" in options:
        # Takes seconds to import.
        from tests.engine.harness import make_request
        from tests.transfer.nccl.engines import EngineRank

        rank = EngineRank(options["model"], options["device"])
    else:
        rank = Rank(seed=options.get("seed"))
    transport, track = rank.transport, None
    say(address=transport.address)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        match name:
            case "pull":
                pull_id, blocks, seconds = arguments
                transport.pull(
                    migrate(pull_id, blocks, blocks, deadline=time.time() + seconds),
                    lambda event: say(**asdict(event)),
                )
            case "fault":
                setattr(rank.faults, *arguments)
                say(returned=name)
            case "open":
                track = rank.open(make_request(arguments[0]))
                say(blocks=track.blocks, next_step=rank.harness.step_id + 1)
            case "compute":
                say(tokens=rank.compute(track, arguments[0]))
            case _:
                getattr(transport, name)(*arguments)
                say(returned=name)


if __name__ == "__main__":
    main()
