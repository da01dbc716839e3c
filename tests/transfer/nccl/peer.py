"""A rank that uses NCCL, in a process of its own: filled blocks, or an engine that prefills.

On a CPU with communicators over sockets, on a card with NCCL's. Says one line per answer or ended pull.
"""

import time
from dataclasses import asdict

from tests import peers
from tests.transfer.nccl.ranks import Rank
from tests.transfer.pools import migrate


def main() -> None:
    options = peers.options()
    if "model" in options:
        # Takes seconds to import.
        from tests.engine.harness import make_request
        from tests.transfer.nccl.engines import EngineRank

        rank = EngineRank(options["model"], options["device"])
    else:
        rank = Rank(seed=options.get("seed"))
    transport, track = rank.transport, None
    peers.say({"address": transport.address})
    for name, *arguments in peers.commands():
        match name:
            case "pull":
                pull_id, blocks, seconds = arguments
                transport.pull(
                    migrate(pull_id, blocks, blocks, deadline=time.time() + seconds),
                    lambda event: peers.say(asdict(event)),
                )
            case "fault":
                setattr(rank.faults, *arguments)
                peers.say({"returned": name})
            case "open":
                track = rank.open(make_request(arguments[0]))
                peers.say({"blocks": track.blocks, "next_step": rank.harness.step_id + 1})
            case "compute":
                peers.say({"tokens": rank.compute(track, arguments[0])})
            case _:
                getattr(transport, name)(*arguments)
                peers.say({"returned": name})


if __name__ == "__main__":
    main()
