"""KV pulls in simulated time: their bytes flow over the cluster's links once they are there to be read.

A pull's prompt may still be computed: the tokens of earlier chunks flow at once, those of the last chunk a group of
layers at a time, as the source's step passes them (layers take equal times). What is ready when the flows before
it have ended goes together. Between two instances pulls take turns, as they do on a transport: of those that have
something ready the oldest flows. Where no network is modelled, a block takes ``Delays.seconds_per_block``, whatever
else is under way, and the last chunk's blocks go when their step has ended.
"""

import heapq
from collections import defaultdict
from dataclasses import dataclass, field

from distserve.core.commands import Migrate
from distserve.core.events import Migrated
from simulator.engine import Engine
from simulator.model import ClusterModel, Delays
from simulator.network import Network, Route
from simulator.recorder import Recorder
from simulator.results import LinkUsage
from simulator.routes import Links, PullRoutes

NUM_LAYER_GROUPS = 4
"""Parts in which the KV of a chunk under way is sent."""

PullKey = tuple[str, int]
"""(the instance that pulls, its number for the pull)"""


@dataclass(slots=True, eq=False)
class _Pull:
    """A pull under way. ``groups`` are (ready at, tokens), earliest first, for what has not started to flow."""

    key: PullKey
    source_id: str
    request_id: str
    per_token: tuple[tuple[Route, int], ...]
    groups: list[tuple[float, float]]
    started_at: float
    num_bytes: int = 0
    flows: set[int] = field(default_factory=set)

    @property
    def pair(self) -> tuple[str, str]:
        """The two instances."""
        return (self.source_id, self.key[0])


class PullNetwork:
    """The links of a deployment, the flows on them, and which of them a pull takes."""

    def __init__(self, model: ClusterModel) -> None:
        assert model.cluster is not None
        assert model.kv is not None
        self.links = Links(model.cluster)
        self.flows = Network(self.links.capacities)
        self._routes = PullRoutes(self.links, model.kv)
        self._instances = {instance.spec.instance_id: instance for instance in model.instances}

    def per_token(self, source_id: str, puller_id: str) -> tuple[tuple[Route, int], ...]:
        """(route, bytes for each token) between two instances."""
        return self._routes.per_token(self._instances[source_id], self._instances[puller_id])

    def seconds_alone(self, per_token: tuple[tuple[Route, int], ...], num_tokens: int) -> float:
        """Seconds that ``num_tokens`` tokens take to flow if nothing else does."""
        capacities = self.links.capacities
        return num_tokens * max(
            (num_bytes / min(capacities[link] for link in route) for route, num_bytes in per_token if route),
            default=0.0,
        )

    def block_size(self, instance_id: str) -> int:
        """Tokens per KV block of an instance."""
        return self._instances[instance_id].spec.kv.block_size

    def usage(self, now: float) -> tuple[LinkUsage, ...]:
        """What every link has carried until ``now``."""
        carried, busy = self.flows.link_bytes(now), self.flows.busy_seconds(now)
        return tuple(map(LinkUsage, self.links.names, self.links.capacities, carried, busy))


class Pulls:
    """All pulls under way. Time must not go backwards."""

    def __init__(self, delays: Delays, network: PullNetwork | None = None, recorder: Recorder | None = None) -> None:
        self._delays = delays
        self._network = network
        self._recorder = recorder
        self._pulls: dict[PullKey, _Pull] = {}
        self._of_flow: dict[int, _Pull] = {}
        self._lines: defaultdict[tuple[str, str], dict[PullKey, _Pull]] = defaultdict(dict)
        """Pulls between two instances (source, puller), the oldest first; empty where there is no network."""
        self._flowing: set[tuple[str, str]] = set()
        """Pairs of instances between which a pull flows."""
        self._timers: list[tuple[float, int, PullKey]] = []
        """When a pull without flows goes on, or ends."""
        self._num_timers = 0
        self._shown_until = 0.0
        """The recorder knows what the links carried until then."""
        self._carried: list[float] = []
        """And this is how much, of each link."""

    @property
    def next_time(self) -> float:
        """When :meth:`advance` is to be called next; infinite if nothing is under way. Seconds."""
        timer = self._timers[0][0] if self._timers else float("inf")
        return timer if self._network is None else min(timer, self._network.flows.next_time)

    def start(self, now: float, puller: str, command: Migrate, source: Engine) -> float | None:
        """Begin a pull. Without a network, its end is sure, and returned: :meth:`end` is to be called then."""
        delays, network = self._delays, self._network
        num_blocks, num_ready = len(command.src_blocks), command.num_ready_blocks
        step_end = source.step_ends.get(command.ready_step, 0.0)
        key = (puller, command.pull_id)
        request_id = command.key[0]
        begin = now + delays.pull_latency
        if network is None:
            early = max(begin + num_ready * delays.seconds_per_block, step_end)
            end = early + (num_blocks - num_ready) * delays.seconds_per_block
            self._pulls[key] = _Pull(key, command.source_id, request_id, (), [], now)
            return end
        block_size = network.block_size(command.source_id)
        per_token = network.per_token(command.source_id, puller)
        if step_end <= begin:
            groups = [(begin, float(num_blocks * block_size))]
        else:
            step_start = source.step_starts[command.ready_step]
            groups = [(begin, float(num_ready * block_size))] if num_ready else []
            num_late = (num_blocks - num_ready) * block_size
            seconds = step_end - step_start
            # Where even the groups before the last flow in no time, one by one would be no sooner than together.
            together = network.seconds_alone(per_token, num_late) <= seconds / NUM_LAYER_GROUPS
            for group in range(NUM_LAYER_GROUPS - 1 if together else 1, NUM_LAYER_GROUPS + 1):
                ready = step_end - seconds * (1 - group / NUM_LAYER_GROUPS)
                is_first = together and group < NUM_LAYER_GROUPS
                groups.append((max(ready, begin), num_late / NUM_LAYER_GROUPS * (group if is_first else 1)))
        num_bytes = num_blocks * block_size * sum(num for _, num in per_token)
        pull = _Pull(key, command.source_id, request_id, per_token, groups, now, num_bytes)
        self._pulls[key] = self._lines[pull.pair][key] = pull
        self._wake(groups[0][0], key)
        return None

    def end(self, now: float, puller: str, pull_id: int) -> bool:
        """A pull whose end was sure has come to it; False if it was given up before."""
        pull = self._pulls.pop((puller, pull_id), None)
        if pull is not None and self._recorder is not None:
            self._recorder.on_pull(pull.request_id, pull.source_id, puller, pull.started_at, now, pull.num_bytes)
        return pull is not None

    def cancel(self, now: float, puller: str, pull_id: int) -> bool:
        """Give a pull up; False if there is none (any more)."""
        pull = self._pulls.pop((puller, pull_id), None)
        if pull is None:
            return False
        self._lines[pull.pair].pop(pull.key, None)
        if pull.flows:
            self._show_links(now)
        for flow_id in pull.flows:
            assert self._network is not None
            del self._of_flow[flow_id]
            self._network.flows.cancel(now, flow_id)
        if pull.flows:
            self._flowing.remove(pull.pair)
            self._take_turns(now, pull.pair)
        return True

    def lose(self, now: float, instance_id: str) -> list[PullKey]:
        """An instance dies: its pulls vanish, and those from it end, which are named."""
        failed = []
        for key, pull in list(self._pulls.items()):
            if instance_id in {key[0], pull.source_id}:
                self.cancel(now, *key)
                if pull.source_id == instance_id:
                    failed.append(key)
        return failed

    def advance(self, now: float) -> list[tuple[str, Migrated]]:
        """Do what is due at ``now``: (who pulled, the event) of every pull that has ended."""
        done: list[tuple[str, Migrated]] = []
        while self._timers and self._timers[0][0] <= now:
            _, _, key = heapq.heappop(self._timers)
            pull = self._pulls.get(key)
            if pull is not None:
                self._take_turns(now, pull.pair)
        network = self._network
        while network is not None and (completion := network.flows.due(now)) is not None:
            time, flow_id = completion
            self._show_links(time)
            network.flows.finish(time, flow_id)
            pull = self._of_flow.pop(flow_id)
            pull.flows.remove(flow_id)
            if not pull.flows:
                self._go_on(now, pull, done)
        return done

    def _go_on(self, now: float, pull: _Pull, done: list[tuple[str, Migrated]]) -> None:
        """What flowed of the pull has arrived: it has ended, or waits for more; another may have its turn."""
        self._flowing.remove(pull.pair)
        if pull.groups:
            if pull.groups[0][0] > now:
                self._wake(pull.groups[0][0], pull.key)
        else:
            del self._pulls[pull.key], self._lines[pull.pair][pull.key]
            puller, pull_id = pull.key
            done.append((puller, Migrated(pull_id, ok=True, num_bytes=pull.num_bytes)))
            if self._recorder is not None:
                self._recorder.on_pull(pull.request_id, pull.source_id, puller, pull.started_at, now, pull.num_bytes)
        self._take_turns(now, pull.pair)

    def _take_turns(self, now: float, pair: tuple[str, str]) -> None:
        """If nothing flows between the two, all that is ready of the oldest pull that has something does."""
        if pair in self._flowing:
            return
        waiting = self._lines[pair].values()
        ready = next((pull for pull in waiting if pull.groups and pull.groups[0][0] <= now), None)
        if ready is None:
            return
        self._flowing.add(pair)
        num_tokens = 0.0
        while ready.groups and ready.groups[0][0] <= now:
            num_tokens += ready.groups.pop(0)[1]
        assert self._network is not None
        self._show_links(now)
        for route, bytes_per_token in ready.per_token:
            flow_id = self._network.flows.start(now, route, num_tokens * bytes_per_token)
            self._of_flow[flow_id] = ready
            ready.flows.add(flow_id)

    def _show_links(self, now: float) -> None:
        """Before flows change: let the recorder know what the links have carried since flows changed last."""
        if self._recorder is None or now <= self._shown_until:
            return
        assert self._network is not None
        # Nothing is solved for that would not be anyway: time has passed since the last change.
        carried = self._network.flows.link_bytes(now)
        if self._carried:
            moved = [after - before for before, after in zip(self._carried, carried, strict=True)]
            self._recorder.on_links(self._shown_until, now, moved)
        self._carried = carried
        self._shown_until = now

    def _wake(self, time: float, key: PullKey) -> None:
        self._num_timers += 1
        heapq.heappush(self._timers, (time, self._num_timers, key))
