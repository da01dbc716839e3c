"""A loop whose instances compute on the cores of one host (:mod:`simulator.host`)."""

from collections.abc import Sequence

from distserve.core.commands import Command, Migrate, RunStep, Send
from distserve.core.events import Machine
from distserve.core.messages import Submit
from simulator.engine import Engine
from simulator.host import Host
from simulator.loop import Loop, Observer, Part
from simulator.model import Delays, HostModel
from simulator.passage import Passage
from simulator.pulls import Pulls

HOST = "host"
"""The host's name on the loop."""


class HostLoop(Loop):
    """A loop whose engines share a host. Nothing is jumped over: a stretch's ends depend on what others do."""

    def __init__(
        self, model: HostModel, delays: Delays, observer: Observer | None = None, pulls: Pulls | None = None
    ) -> None:
        super().__init__(delays, observer, pulls)
        self._host = Host(model, self)
        super().add(HOST, self._host)

    def add(self, name: str, machine: Machine, engine: Engine | None = None, *, may_jump: bool = False) -> None:
        """See :class:`simulator.loop.Loop`."""
        if engine is not None:
            self._host.add_instance(name, engine.num_stages, engine.num_shards)
        super().add(name, machine, engine, may_jump=may_jump)

    def lose(self, name: str) -> float:
        """See :class:`simulator.loop.Loop`."""
        noticed_at = super().lose(name)
        super()._execute(self._parts[HOST], self._host.drop(self.now, name))
        return noticed_at

    def _execute(self, part: Part, commands: Sequence[Command]) -> None:
        host = self._parts[HOST]
        for command in commands:
            match command:
                case RunStep():
                    assert part.engine is not None
                    super()._execute(host, self._host.run_step(self.now, self._passage(part.engine, command)))
                case Send(_, Submit(request)):
                    super()._execute(host, self._host.take_request(self.now, request.num_prefill_tokens))
                    super()._execute(part, (command,))
                case Migrate():
                    super()._execute(host, self._host.pull(self.now, part.name, len(command.src_blocks)))
                    super()._execute(part, (command,))
                case _:
                    super()._execute(part, (command,))

    def _passage(self, engine: Engine, step: RunStep) -> Passage:
        """A step on its way through an instance's engine, with the light work on its tokens behind it."""
        _, event = engine.launch(self.now, step)
        seconds, between = engine.stage_times()
        model, num_tokens = self._host.model, sum(chunk.samples for chunk in step.chunks)
        aftermath = model.cpu_per_step + num_tokens * model.cpu_per_token if num_tokens else 0.0
        return Passage(engine.name, event, seconds, between, aftermath)
