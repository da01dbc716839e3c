"""A rank that uses NCCL, in a process of its own: filled blocks, or an engine that prefills.

On a CPU with communicators over sockets, on a card with NCCL's. Says an answer to each command, and pulls that ended.
"""

import time
from dataclasses import asdict

from tests.engine.harness import make_request
from tests.peers import Line
from tests.transfer.nccl.engines import EngineRank
from tests.transfer.nccl.ranks import Rank
from tests.transfer.pools import migrate


def main(line: Line, *, model: str | None = None, device: str = "cpu", seed: int | None = None) -> None:
    rank = EngineRank(model, device) if model else Rank(seed=seed)
    transport, track = rank.transport, None
    line.say(transport.address)
    for name, *arguments in line.commands():
        match name:
            case "pull":
                pull_id, blocks, seconds = arguments
                transport.pull(
                    migrate(pull_id, blocks, blocks, deadline=time.time() + seconds),
                    lambda event: line.say(asdict(event)),
                )
            case "fault":
                setattr(rank.faults, *arguments)
                line.say({"returned": name})
            case "open":
                track = rank.open(make_request(arguments[0]))
                line.say({"blocks": track.blocks, "next_step": rank.harness.step_id + 1})
            case "compute":
                line.say({"tokens": rank.compute(track, arguments[0])})
            case _:
                getattr(transport, name)(*arguments)
                line.say({"returned": name})
