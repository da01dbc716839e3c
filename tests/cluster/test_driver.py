"""The driver executes commands in order, one event at a time, and its log can be replayed."""

import threading
from pathlib import Path

import pytest

from distserve.cluster.clock import TimerThread, cluster_time
from distserve.cluster.driver import Driver
from distserve.cluster.replay import EventLog, read_log, replay
from distserve.core.commands import (
    CancelMigrate,
    CloseSequence,
    Command,
    Conclude,
    Deliver,
    Migrate,
    RunStep,
    Send,
    WakeAt,
)
from distserve.core.events import ClientGone, Event, InstanceLost, Received, StepDone, Timer
from distserve.core.messages import Abort, Hello, InstanceGone

from .fakes import Recorder, Scripted, ticking

ALL = (
    Send("router", Hello()),
    WakeAt(3.0),
    CloseSequence(7),
    RunStep(1, ()),
    Migrate(4, ("r", 0), "prefill-0", (1,), (2,), 1, 0, 9.0),
    CancelMigrate(4),
    Deliver("r", ()),
    Conclude("r"),
)


def test_commands_reach_their_ports_in_order() -> None:
    ports = Recorder()
    driver = Driver(
        Scripted(lambda _now, _event: ALL), lambda: 1.0, ports, ports, engine=ports, migrator=ports, sink=ports
    )
    driver.feed(StepDone(0, ()))
    assert [name for name, _ in ports.calls] == [
        "send router",
        "wake_at",
        "submit",
        "submit",
        "migrate",
        "cancel",
        "deliver",
        "conclude",
    ]
    assert ports.calls[1] == ("wake_at", 3.0)
    assert ports.calls[2:4] == [("submit", ALL[2]), ("submit", ALL[3])]


def test_the_first_event_is_a_timer_and_time_never_goes_back() -> None:
    times = iter([5.0, 4.0, 6.0])
    machine = Scripted()
    driver = Driver(machine, lambda: next(times), Recorder(), Recorder())
    driver.start()
    driver.feed(ClientGone("a"))
    driver.feed(ClientGone("b"))
    assert machine.fed == [(5.0, Timer()), (5.0, ClientGone("a")), (6.0, ClientGone("b"))]


def test_a_stopped_driver_ignores_events() -> None:
    machine = Scripted()
    driver = Driver(machine, lambda: 0.0, Recorder(), Recorder())
    driver.stop()
    driver.feed(Timer())
    assert machine.fed == []


def test_events_from_many_threads_are_handled_one_at_a_time() -> None:
    inside = threading.Semaphore(1)
    overlaps = []

    def answer(now: float, event: Event) -> tuple[Command, ...]:
        if not inside.acquire(blocking=False):
            overlaps.append(event)
        else:
            inside.release()
        return (Send("x", Hello()), Send("y", Hello()))

    ports = Recorder()
    driver = Driver(Scripted(answer), cluster_time, ports, ports)

    def feed_many() -> None:
        for _ in range(200):
            driver.feed(ClientGone("r"))

    threads = [threading.Thread(target=feed_many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not overlaps
    assert [name for name, _ in ports.calls] == ["send x", "send y"] * 800


def test_timers_come_due_in_time_and_stop_with_close() -> None:
    machine = Scripted(ticking(0.01))
    third = threading.Event()

    def on_timer() -> None:
        driver.feed(Timer())
        if len(machine.fed) >= 4:
            third.set()

    timers = TimerThread(on_timer)
    driver = Driver(machine, cluster_time, Recorder(), timers)
    timers.start()
    driver.start()
    assert third.wait(5)
    timers.close()
    count = len(machine.fed)
    gaps = [later - earlier for (earlier, _), (later, _) in zip(machine.fed, machine.fed[1:], strict=False)]
    assert min(gaps) >= 0.01
    assert not third.wait(0) or len(machine.fed) == count


def test_an_earlier_timer_overtakes_a_later_one() -> None:
    due: list[float] = []
    first = threading.Event()

    def on_timer() -> None:
        due.append(cluster_time())
        first.set()

    timers = TimerThread(on_timer)
    timers.start()
    start = cluster_time()
    timers.wake_at(start + 30)
    timers.wake_at(start + 0.02)
    assert first.wait(5)
    timers.close()
    assert due[0] >= start + 0.02


class Counting:
    """Sends how many events it has seen: its answers depend on its whole history."""

    def __init__(self, step: int = 1) -> None:
        self.count = 0
        self.step = step

    def handle(self, now: float, _event: Event) -> tuple[Command, ...]:
        self.count += self.step
        return (Send("x", Abort(("r", self.count), None)), WakeAt(now + 1))


EVENTS: tuple[Event, ...] = (
    Timer(),
    Received("router", InstanceGone("prefill-0")),
    InstanceLost("decode-1"),
    StepDone(3, (1, 2), None, ((4, ()),)),
)


@pytest.fixture
def logged(tmp_path: Path) -> Path:
    path = tmp_path / "logs" / "machine.log"
    with EventLog(path) as log:
        driver = Driver(Counting(), cluster_time, Recorder(), Recorder(), log=log)
        for event in EVENTS:
            driver.feed(event)
    return path


def test_replaying_a_log_gives_the_commands_of_the_live_run(logged: Path) -> None:
    steps = list(replay(logged, Counting()))
    assert tuple(event for _, event, _, _ in steps) == EVENTS
    assert all(live == again for _, _, live, again in steps)
    assert [len(live) for _, _, live, _ in steps] == [2, 2, 2, 2]


def test_replay_shows_where_another_machine_differs(logged: Path) -> None:
    assert any(live != again for _, _, live, again in replay(logged, Counting(step=2)))


def test_a_log_cut_anywhere_reads_up_to_the_cut(logged: Path) -> None:
    data = logged.read_bytes()
    whole = list(read_log(logged))
    for end in range(0, len(data), 7):
        logged.write_bytes(data[:end])
        events = [event for _, event, _ in read_log(logged)]
        assert events == [event for _, event, _ in whole][: len(events)]
    assert len(whole) == len(EVENTS)
