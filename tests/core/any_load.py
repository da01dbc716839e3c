"""Any load on any small deployment: little memory, short steps and short leases meet every limit."""

from typing import Any

from hypothesis import strategies as st

from distserve.core.config import KvConfig, SchedulerConfig
from distserve.core.request import Request
from distserve.core.router import RouterConfig
from simulator.model import Delays
from tests.core.harness import Deployment, make_request

Load = list[tuple[Request, float | None]]
"""Requests, each with the seconds after its arrival at which the client goes away; None: it stays."""

_PARTS = st.sampled_from(["api-0", "router", "prefill-0", "prefill-1", "decode-0", "decode-1", "mixed-0", "mixed-1"])
PAIRS = st.dictionaries(st.tuples(_PARTS, _PARTS), st.floats(0.0001, 0.05), max_size=6)
"""Seconds that messages take from one part to another, where they are not what they are elsewhere."""


def loads(latest: float) -> st.SearchStrategy[Load]:
    """Requests that come within ``latest`` seconds."""
    request = st.tuples(
        st.integers(1, 70),  # prompt
        st.integers(0, 60),  # seed, which gives the output length
        st.integers(1, 24),  # max_tokens
        st.integers(1, 3),  # n
        st.floats(0, latest),  # arrival
        st.one_of(st.none(), st.floats(0, 1.0)),  # abandoned after
    )
    return st.lists(request, min_size=1, max_size=14).map(_made)


def _made(drawn: list[tuple[int, int, int, int, float, float | None]]) -> Load:
    return [
        (make_request(f"r{i}", prompt, seed=seed, max_tokens=max_tokens, n=n, arrival=arrival), abandoned)
        for i, (prompt, seed, max_tokens, n, arrival, abandoned) in enumerate(drawn)
    ]


def serving(
    load: Load,
    pools: tuple[int, int, int],
    blocks: int,
    in_flight: tuple[int, bool],
    *,
    delays: Delays = Delays(),
    router: RouterConfig = RouterConfig(),
    remembers: bool = False,
    **config: Any,
) -> Deployment:
    """A deployment that is given the load.

    ``pools`` are the numbers of prefill, decode and mixed instances, each with ``blocks`` of memory; ``in_flight`` is
    how many steps are under way at once, and whether with lookahead. ``config`` is what else SchedulerConfig takes.
    """
    prefill, decode, mixed = pools
    scheduler = SchedulerConfig(
        max_batch_tokens=24,
        max_batch_size=6,
        max_in_flight=in_flight[0],
        lookahead=in_flight[1],
        lease=2.0,
        **config,
    )
    cluster = Deployment(
        prefill=prefill,
        decode=decode,
        mixed=mixed,
        kv=KvConfig(blocks, 4),
        config=scheduler,
        delays=delays,
        router=router,
        remembers=remembers,
    )
    for request, abandoned in load:
        cluster.submit(request)
        if abandoned is not None:
            cluster.abandon(request.arrival + abandoned, request.request_id)
    return cluster
