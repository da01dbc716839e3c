"""Which instance computes a prompt: the router's choice among those that can, from what it knows of them.

Of one kind of instance it is the one with the shortest predicted wait: (tokens waiting + tokens assigned since the
report) / measured tokens per second. With prefix caching an instance that was sent the prompt's head before gets it if
it would be done sooner there: if what it need not compute outweighs the longer wait. So a prompt never waits longer
than its hit saves while another instance is idle. A mixed instance must also have a place for it and not run far more
than its share: what decodes there would feel it. Where there are prefill and mixed instances, the best of each is found
this way, and the rule of :mod:`distserve.core.hybrid` decides between the two.
"""

from collections.abc import Sequence

from distserve.core.config import SLO, Role
from distserve.core.hybrid import is_far, is_short, strain
from distserve.core.instance_view import InstanceView
from distserve.core.records import record
from distserve.core.request import Request
from distserve.core.routed_prefixes import PromptKeys

_SHARE, _FEW = 1.5, 4
"""A mixed instance preferred for a hit has at most so many times the other's requests, and so many more."""


@record(frozen=True, slots=True)
class PromptChoice:
    """Who computes a prompt, how many of its tokens are there, and the shortest wait (seconds) of its kind.

    ``rate`` is the mean of what instances compute, in prompt tokens per second: of one that has computed nothing yet it
    is expected, too.
    """

    view: InstanceView
    num_cached: int
    wait: float
    rate: float

    def num_tokens(self, request: Request) -> int:
        """Tokens of the prompt that are left to compute there."""
        return request.num_prefill_tokens - self.num_cached


class PromptChooser:
    """Chooses for ``slo``; ``keys`` are those of requests' blocks."""

    def __init__(self, slo: SLO, keys: PromptKeys) -> None:
        self._slo = slo
        self._keys = keys

    def choose(
        self,
        now: float,
        request: Request,
        candidates: Sequence[InstanceView],
        decoding: Sequence[InstanceView],
        *,
        is_memory_short: bool,
    ) -> PromptChoice:
        """The choice among ``candidates``, prefill and mixed instances that can compute the prompt.

        ``decoding`` are all instances that decode. While ``is_memory_short``, computed prompts wait for memory on them.
        """
        rates = [view.report.prefill_rate for view in candidates if view.report.prefill_rate > 0]
        rate = sum(rates) / len(rates) if rates else 0.0
        mixed = Role.MIXED
        remote = [view for view in candidates if view.spec.role is not mixed]
        local = [view for view in candidates if view.spec.role is mixed]
        if not remote or not local:
            return self._soonest(candidates, request, rate)
        there, here = self._soonest(remote, request, rate), self._soonest(local, request, rate)
        num_choices = len(request.choices)
        if is_memory_short or not here.view.has_room_for_prompt(here.num_tokens(request), num_choices):
            return there
        if not there.view.has_room_for_prompt(there.num_tokens(request), num_choices):
            return here
        undisturbed = min([view.interval(now) for view in decoding])
        remotely = strain(there.view.first_token(now, there.num_tokens(request), rate), undisturbed, self._slo)
        num_tokens = here.num_tokens(request)
        disturbed = here.view.interval(now, num_tokens)
        locally = strain(here.view.first_token(now, num_tokens, rate), disturbed, self._slo)
        report = here.view.report
        is_trifle = report.prompt_seconds > 0 and is_short(num_tokens, report.step_seconds, report.prompt_seconds)
        return here if locally < remotely or (is_trifle and is_far(locally)) else there

    def _soonest(self, candidates: Sequence[InstanceView], request: Request, default_rate: float) -> PromptChoice:
        """Who of one kind computes the prompt soonest."""
        # Equal waits (an idle pool) go to whoever has the least assigned, then by name: deterministic.
        shortest = min(
            candidates,
            key=lambda view: (
                view.wait(default_rate),
                view.num_tokens_ahead,
                view.report.num_running,
                view.spec.instance_id,
            ),
        )
        wait = shortest.wait(default_rate)
        if all(view.prefixes is None for view in candidates):
            return PromptChoice(shortest, 0, wait, default_rate)
        cached = {view.spec.instance_id: self._num_cached(view, request) for view in candidates}
        num_cached = cached[shortest.spec.instance_id]
        if max(cached.values()) <= num_cached:
            # The others wait as long, or longer, and compute no less.
            return PromptChoice(shortest, num_cached, wait, default_rate)
        rate = default_rate or 1.0  # where nobody has computed anything, tokens are compared
        fair = _SHARE * shortest.num_requests + _FEW
        best, soonest = shortest, shortest.wait(rate) + (request.num_prefill_tokens - num_cached) / rate
        for view in candidates:
            there = cached[view.spec.instance_id]
            num_tokens = request.num_prefill_tokens - there
            is_fair = view.spec.role is not Role.MIXED or view.num_requests < fair
            if there <= num_cached or not is_fair or not view.has_room_for_prompt(num_tokens, len(request.choices)):
                continue
            done = view.wait(rate) + num_tokens / rate
            if done < soonest:
                best, soonest = view, done
        return PromptChoice(best, cached[best.spec.instance_id], wait, default_rate)

    def _num_cached(self, view: InstanceView, request: Request) -> int:
        """Tokens of a prompt that an instance should not have to compute: never the last, nor any to be scored."""
        if view.prefixes is None or request.sampling.prompt_logprobs is not None:
            return 0
        block_size = view.spec.kv.block_size
        num_held = view.prefixes.num_held(self._keys.make(request, block_size))
        return min(num_held, (request.num_prefill_tokens - 1) // block_size) * block_size
