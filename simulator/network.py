"""Links that flows share max-min fairly: who gets how many bytes/s, and which flow ends next.

A flow crosses the links of its route at one rate. Rates are the max-min fair ones (Bertsekas and Gallager, "Data
Networks", 6.5.2, by progressive filling): they are as high as the links allow, and a flow's rate can only be raised by
lowering that of a flow that has no more. They hold from one start or end of a flow to the next, at which they are
found anew, for the flows that share links with it, directly or through others; the rest is not touched. What starts and
ends at one time is solved for once.

Flows of one route always have the same rate, so they are one *class*: it counts the bytes each of its flows has
received since the class began, and a flow ends when that reaches a mark fixed at its start. Starting the thousandth
flow of a route costs what starting the second one does.

The caller owns the clock: it asks for the next completion, and calls :meth:`Network.finish` at that time, unless it
starts or cancels a flow before. Nothing here knows what the bytes are for.
"""

from collections.abc import Sequence
from heapq import heapify, heappop, heappush

Route = tuple[int, ...]
"""The links a flow crosses, by index, each once. Empty: nothing is crossed, the flow ends as it starts."""

_INFINITY = float("inf")
_SLACK = 64
"""Outdated entries that the heap may hold beside as many as there are valid ones."""


class _Class:
    """The flows of one route. ``served``: bytes each has received, at ``since``, since the class was last empty."""

    __slots__ = ("end", "entry", "limit", "marks", "num", "rate", "reached", "route", "served", "settled", "since")

    def __init__(self, route: Route, limit: float) -> None:
        self.route = route
        self.limit = limit  # the rate of a lone flow
        self.num = 0
        self.rate = 0.0
        self.served = 0.0
        self.since = 0.0
        self.marks: list[tuple[float, int]] = []  # (served at the end, flow), a heap; its top is under way
        self.end = _INFINITY
        self.entry = -1  # the number of its valid entry in the network's heap
        self.reached = self.settled = 0  # the last solution that saw it, and that gave it a rate


class Network:
    """Links of given ``capacities`` (bytes/s, each above 0) and the flows on them. Time must not go backwards."""

    def __init__(self, capacities: Sequence[float]) -> None:
        assert all(0 < capacity < _INFINITY for capacity in capacities)
        num_links = len(capacities)
        self._capacities = tuple(capacities)
        self._classes: dict[Route, _Class] = {}
        self._on: list[list[_Class]] = [[] for _ in capacities]  # each link's classes that have flows
        self._flows: dict[int, tuple[_Class | None, float, float]] = {}  # class, mark at start, mark at end
        self._heap: list[tuple[float, int, _Class | None, int]] = []  # (end, entry, class or None: at once, flow)
        self._num_entries = 0
        self._num_flows = 0
        self._changed: list[_Class] = []  # whose flows, at one time, are not the ones the rates were found for
        self._changed_at = 0.0
        self._num_solutions = 0
        self._seen = [0] * num_links  # the last solution that saw each link
        self._left = [0.0] * num_links  # while solving: bytes/s of each link not given to a flow yet,
        self._num = [0] * num_links  # the flows on it without a rate yet,
        self._levels = [0.0] * num_links  # and what each of them could have: left / num
        self._num_bytes = [0.0] * num_links
        self._busy = [0.0] * num_links
        self._busy_since = [0.0] * num_links

    def start(self, now: float, route: Route, num_bytes: float) -> int:
        """Let ``num_bytes`` flow over ``route`` from ``now`` on; returns the flow's identity."""
        flow_id = self._num_flows
        self._num_flows = flow_id + 1
        if not route or num_bytes <= 0:
            self._flows[flow_id] = (None, 0.0, 0.0)
            self._num_entries += 1
            heappush(self._heap, (now, self._num_entries, None, flow_id))
            return flow_id
        if self._changed and now > self._changed_at:
            self._solve()
        of_route = self._classes.get(route)
        if of_route is None:
            limit = min(self._capacities[link] for link in route)
            of_route = self._classes[route] = _Class(route, limit)
        alone = True
        if of_route.num:
            of_route.served += of_route.rate * (now - of_route.since)
            for link in route:
                if len(self._on[link]) > 1:
                    alone = False
        else:
            of_route.served = 0.0
            for link in route:
                on_link = self._on[link]
                if on_link:
                    alone = False
                else:
                    self._busy_since[link] = now
                on_link.append(of_route)
        of_route.since = now
        of_route.num += 1
        mark = of_route.served + num_bytes
        self._flows[flow_id] = (of_route, of_route.served, mark)
        heappush(of_route.marks, (mark, flow_id))
        if alone:
            self._retime(of_route, now, of_route.limit / of_route.num)
        else:
            self._change(now, of_route)
        return flow_id

    @property
    def next_time(self) -> float:
        """When the next flow ends if nothing starts or is cancelled before; infinite without flows. Seconds."""
        if self._changed:
            self._solve()
        heap = self._heap
        while heap:
            time, entry, of_route, _ = heap[0]
            if of_route is None or of_route.entry == entry:
                return time
            heappop(heap)
        return _INFINITY

    def due(self, now: float) -> tuple[float, int] | None:
        """:meth:`next_completion` if it is not after ``now``.

        Rates are not found anew between flows that end at one time: what has arrived has, whatever the others' rates.
        """
        heap = self._heap
        while heap:
            time, entry, of_route, flow_id = heap[0]
            if of_route is None:
                break
            if of_route.entry == entry:
                flow_id = of_route.marks[0][1]
                break
            heappop(heap)
        else:
            time, flow_id = _INFINITY, -1
        if self._changed and time > self._changed_at:
            self._solve()
            return self.due(now)
        return (time, flow_id) if heap and time <= now else None

    def next_completion(self) -> tuple[float, int] | None:
        """:attr:`next_time` and the flow that ends then, None without flows."""
        return self.due(self.next_time)

    def finish(self, now: float, flow_id: int) -> None:
        """The flow that :meth:`next_completion` named has ended, ``now`` being the time it named."""
        of_route, start, mark = self._flows.pop(flow_id)
        if of_route is None:
            assert self._heap[0][3] == flow_id, "another flow ends first"
            heappop(self._heap)
            return
        assert of_route.marks[0][1] == flow_id, "another flow ends first"
        assert now == of_route.end, "the flow ends at another time"
        # The mark itself, not what rounding makes of rate x time: flows that started alike end alike.
        of_route.served = mark
        self._leave(now, of_route, mark - start)

    def cancel(self, now: float, flow_id: int) -> float:
        """Take a flow off its links before its end; returns the bytes it still had to go."""
        of_route, start, mark = self._flows.pop(flow_id)
        if of_route is None:
            self._heap = [entry for entry in self._heap if entry[3] != flow_id]
            heapify(self._heap)
            return 0.0
        if self._changed and now > self._changed_at:
            self._solve()
        of_route.served = min(of_route.served + of_route.rate * (now - of_route.since), of_route.marks[0][0])
        served = of_route.served
        self._leave(now, of_route, served - start)
        return mark - served

    def link_bytes(self, now: float) -> list[float]:
        """Bytes each link has carried until ``now``, those of flows under way and cancelled included."""
        if self._changed:
            self._solve()
        carried = list(self._num_bytes)
        for of_route, start, mark in self._flows.values():
            if of_route is not None:
                served = min(of_route.served + of_route.rate * (now - of_route.since), mark)
                for link in of_route.route:
                    carried[link] += served - start
        return carried

    def busy_seconds(self, now: float) -> list[float]:
        """Seconds until ``now`` during which at least one flow was on each link."""
        return [
            busy + (now - since if on_link else 0.0)
            for busy, since, on_link in zip(self._busy, self._busy_since, self._on, strict=True)
        ]

    def rate(self, flow_id: int) -> float:
        """Bytes/s at which a flow under way flows; infinite for one without links."""
        if self._changed:
            self._solve()
        of_route, _, _ = self._flows[flow_id]
        return _INFINITY if of_route is None else of_route.rate

    def _leave(self, now: float, of_route: _Class, num_bytes: float) -> None:
        """One flow of a class that is served up to ``now``, already out of ``_flows``, has had its ``num_bytes``."""
        route = of_route.route
        of_route.since = now
        of_route.num -= 1
        shared = False
        if of_route.num:
            marks = of_route.marks
            while marks[0][1] not in self._flows:
                heappop(marks)
            for link in route:
                self._num_bytes[link] += num_bytes
                if len(self._on[link]) > 1:
                    shared = True
            if not shared:
                self._retime(of_route, now, of_route.limit / of_route.num)
        else:
            of_route.marks.clear()
            of_route.entry = -1
            for link in route:
                self._num_bytes[link] += num_bytes
                on_link = self._on[link]
                on_link.remove(of_route)
                if on_link:
                    shared = True
                else:
                    self._busy[link] += now - self._busy_since[link]
        if shared:
            self._change(now, of_route)

    def _change(self, now: float, of_route: _Class) -> None:
        """The flows of a class that is served up to ``now`` are others: its rate and its next end are to be found."""
        of_route.rate = 0.0
        of_route.entry = -1
        self._changed.append(of_route)
        self._changed_at = now

    def _solve(self) -> None:
        """Find the rates of all classes that those changed share links with, directly or through others."""
        now = self._changed_at
        self._num_solutions = solution = self._num_solutions + 1
        on, seen, capacities = self._on, self._seen, self._capacities
        reached = self._changed
        self._changed = []
        left, num, levels = self._left, self._num, self._levels
        links: list[int] = []  # those with flows without a rate yet
        for of_route in reached:  # grows on the way
            for link in of_route.route:
                if seen[link] == solution:
                    continue
                seen[link] = solution
                count = 0
                for other in on[link]:
                    count += other.num
                    if other.reached != solution:
                        other.reached = solution
                        reached.append(other)
                if count:
                    links.append(link)
                    left[link] = capacities[link]
                    num[link] = count
                    levels[link] = capacities[link] / count
        while links:
            tightest = links[0]
            level = levels[tightest]
            for link in links:
                if levels[link] < level:
                    tightest, level = link, levels[link]
            for of_route in on[tightest]:
                if of_route.settled == solution:
                    continue
                of_route.settled = solution
                weight = of_route.num
                for link in of_route.route:
                    num[link] = count = num[link] - weight
                    if count:
                        left[link] = rest = left[link] - level * weight
                        levels[link] = rest / count if rest > 0.0 else level
                if level != of_route.rate:
                    self._retime(of_route, now, level)
            links = [link for link in links if num[link]]

    def _retime(self, of_route: _Class, now: float, rate: float) -> None:
        """From ``now`` on each flow of the class has ``rate``."""
        served = of_route.served
        if now > of_route.since:
            served += of_route.rate * (now - of_route.since)
            of_route.served = served
            of_route.since = now
        of_route.rate = rate
        to_go = of_route.marks[0][0] - served
        of_route.end = end = now + to_go / rate if to_go > 0.0 else now
        self._num_entries = of_route.entry = entry = self._num_entries + 1
        heap = self._heap
        if len(heap) > _SLACK + 2 * len(self._flows):
            self._heap = heap = [old for old in heap if old[2] is None or old[2].entry == old[1]]
            heapify(heap)
        heappush(heap, (end, entry, of_route, -1))
