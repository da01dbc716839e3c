"""A rank on a card in a process of its own: a pool of filled blocks, or an engine that prefills."""

from distserve.core.config import KvLayout
from tests import peers
from tests.engine.harness import make_request
from tests.transfer.cards import CardRank


def main() -> None:
    options = peers.options()
    layout = KvLayout(**options["layout"]) if "layout" in options else None
    rank = CardRank(options["card"], layout=layout, model=options.get("model"))
    transport = rank.transport
    if "seed" in options:
        rank.fill(options["seed"])
    peers.say({"address": transport.address})
    track = None
    for name, *arguments in peers.commands():
        match name:
            case "open":
                track = rank.harness.open(make_request(arguments[0]))
                rank.harness._grow(track, len(arguments[0]))
                peers.say({"blocks": track.blocks, "next_step": rank.harness.step_id + 1})
            case "compute":
                step_id = rank.harness.step_id + 1
                transport.begin_step(step_id)
                done = rank.harness.step(
                    (track, arguments[0]), on_layer=lambda layer, step_id=step_id: transport.layer_done(step_id, layer)
                )
                transport.end_step(step_id)
                peers.say({"tokens": done.tokens})
            case _:
                getattr(transport, name)(*arguments)
                peers.say({"returned": name})


if __name__ == "__main__":
    main()
