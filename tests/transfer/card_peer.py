"""A rank on a card in a process of its own: a pool of filled blocks, or an engine that prefills."""

from distserve.core.config import KvLayout
from tests.engine.harness import make_request
from tests.peers import Line
from tests.transfer.cards import CardRank


def main(
    line: Line, card: str, *, layout: KvLayout | None = None, model: str | None = None, seed: int | None = None
) -> None:
    rank = CardRank(card, layout=layout, model=model)
    transport, track = rank.transport, None
    if seed is not None:
        rank.fill(seed)
    line.say(transport.address)
    for name, *arguments in line.commands():
        match name:
            case "open":
                track = rank.harness.open(make_request(arguments[0]))
                rank.harness._grow(track, len(arguments[0]))
                line.say({"blocks": track.blocks, "next_step": rank.harness.step_id + 1})
            case "compute":
                step_id = rank.harness.step_id + 1
                transport.begin_step(step_id)
                done = rank.harness.step(
                    (track, arguments[0]), on_layer=lambda layer, step_id=step_id: transport.layer_done(step_id, layer)
                )
                transport.end_step(step_id)
                line.say({"tokens": done.tokens})
            case _:
                getattr(transport, name)(*arguments)
                line.say({"returned": name})
