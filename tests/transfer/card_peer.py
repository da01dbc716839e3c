"""A rank on a card in a process of its own, driven line by line: a pool of filled blocks, or an engine that prefills.

Reads JSON commands from standard input, writes one JSON line per answer.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))

from distserve.core.config import KvLayout
from tests.engine.harness import make_request
from tests.transfer.cards import CardRank


def say(**line: object) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main() -> None:
    options = json.loads(sys.argv[1])
    layout = KvLayout(**options["layout"]) if "layout" in options else None
    rank = CardRank(options["card"], layout=layout, model=options.get("model"))
    transport = rank.transport
    if "seed" in options:
        rank.fill(options["seed"])
    say(address=transport.address)
    track = None
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        match name:
            case "open":
                track = rank.harness.open(make_request(arguments[0]))
                rank.harness._grow(track, len(arguments[0]))
                say(blocks=track.blocks, next_step=rank.harness.step_id + 1)
            case "compute":
                step_id = rank.harness.step_id + 1
                transport.begin_step(step_id)
                done = rank.harness.step(
                    (track, arguments[0]), on_layer=lambda layer, step_id=step_id: transport.layer_done(step_id, layer)
                )
                transport.end_step(step_id)
                say(tokens=done.tokens)
            case _:
                getattr(transport, name)(*arguments)
                say(returned=name)


if __name__ == "__main__":
    main()
