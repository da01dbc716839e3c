"""The communicators of a link, by generation: what the state machine says of them is done here."""

from collections.abc import Callable, Iterator

from distserve.transfer.nccl.agreement import Abandon, Abort, Destroy, Event, MakeId, Open, Receive, Send
from distserve.transfer.nccl.collectives import Collectives
from distserve.transfer.nccl.generation import Generation
from distserve.transfer.nccl.staging import Staging

Steering = MakeId | Open | Send | Receive | Abandon | Abort | Destroy


class Generations:
    """Those that are not given up yet. Methods are for one thread; ``report`` is called on any, and must not block."""

    def __init__(self, collectives: Collectives, staging: Staging, report: Callable[[Event], None]) -> None:
        self._collectives = collectives
        self._staging = staging
        self._report = report
        self._live: dict[int, Generation] = {}

    def do(self, command: Steering) -> None:
        """Begin what ``command`` says; never waits."""
        match command:
            case MakeId(number):
                self._named(number).make_id()
            case Open(number, unique_id, rank):
                self._named(number).open(unique_id, rank)
            case Send(number, op_id, slot, num_bytes):
                self._live[number].send(op_id, self._staging.outgoing[slot][:num_bytes])
            case Receive(number, op_id, slot, num_bytes):
                self._live[number].recv(op_id, self._staging.incoming[slot][:num_bytes])
            case Abandon(number) | Abort(number):
                self._live.pop(number).abort()
            case Destroy(number):
                self._live.pop(number).destroy()

    @property
    def is_moving(self) -> bool:
        """Whether :meth:`poll` may have something to say soon."""
        return any(generation.is_moving for generation in self._live.values())

    def poll(self) -> Iterator[Event]:
        """What has ended or failed since; never waits."""
        for generation in self._live.values():
            yield from generation.poll()

    def abort(self) -> None:
        """End them all."""
        for generation in self._live.values():
            generation.abort()

    def _named(self, number: int) -> Generation:
        """The source's begins with its name, the sink's when it is opened."""
        if number not in self._live:
            self._live[number] = Generation(number, self._collectives, self._report)
        return self._live[number]
