"""What the router knows of one instance: its last report, and what it was given since."""

from dataclasses import dataclass, field

from distserve.core.config import InstanceSpec, Role
from distserve.core.hybrid import RecentTokens, interval
from distserve.core.messages import Report, RequestKey
from distserve.core.records import record
from distserve.core.routed_prefixes import RoutedPrefixes


@record(frozen=True, slots=True)
class Work:
    """What an attempt will take on an instance: prompt ``tokens`` to compute, or ``blocks`` for KV that moves there.

    ``through`` is the part it comes through.
    """

    through: str
    tokens: int = 0
    blocks: int = 0


@dataclass(slots=True)
class InstanceView:
    """What the router knows of one instance.

    ``assigned`` is work given to it that no report has named yet, ``recent`` what it was given to compute of late;
    ``done_at`` is when all prompts given to it so far should be computed. ``prefixes`` is what its prefix cache should
    hold; None if that is of no interest.
    """

    spec: InstanceSpec
    report: Report
    heard_at: float
    recent: RecentTokens
    done_at: float = 0.0
    assigned: dict[RequestKey, Work] = field(default_factory=dict)
    is_draining: bool = False
    becoming: Role | None = None
    """The role it changes to; it is draining until it has."""
    prefixes: RoutedPrefixes | None = None
    # What is asked for every request, from the specification; a change of role leaves it as it is.
    max_kv_tokens: int = field(init=False)
    max_model_len: int = field(init=False)
    num_blocks: int = field(init=False)
    headroom: int = field(init=False)
    """Blocks that it keeps free when it takes KV in while anything runs."""

    def __post_init__(self) -> None:
        kv, scheduler = self.spec.kv, self.spec.scheduler
        self.max_kv_tokens, self.max_model_len = kv.num_tokens, scheduler.max_model_len
        self.num_blocks, self.headroom = kv.num_blocks, int(scheduler.headroom * kv.num_blocks)

    @classmethod
    def fresh(cls, spec: InstanceSpec, now: float, window: float, *, remembers: bool) -> "InstanceView":
        """An instance that has just come up and has said nothing; ``remembers``: what it is sent is to be noted.

        ``window`` is in seconds, see :class:`RecentTokens`.
        """
        prefixes = RoutedPrefixes(spec.kv.num_blocks) if remembers else None
        report = Report(spec.instance_id, 0, 0, 0, spec.kv.num_blocks)
        return cls(spec, report, now, RecentTokens(window), prefixes=prefixes)

    def note(self, report: Report, now: float) -> None:
        """Take a report: the attempts it names are in its figures now."""
        self.report = report
        self.heard_at = now
        for key in report.seen:
            self.assigned.pop(key, None)
        if report.prompt_rate > 0:
            self.done_at = now + (self.num_tokens_ahead + report.num_launched_tokens) / report.prompt_rate

    def give(self, key: RequestKey, num_tokens: int, through: str, now: float, default_rate: float) -> None:
        """A prompt with ``num_tokens`` to compute is sent to it."""
        self.assigned[key] = Work(through, tokens=num_tokens)
        self.recent.add(now, num_tokens)
        self.done_at = now + self.first_token(now, num_tokens, default_rate)

    @property
    def num_pending_tokens(self) -> int:
        """Prompt tokens to compute, assigned and not yet reported."""
        return sum([work.tokens for work in self.assigned.values()])

    @property
    def num_tokens_ahead(self) -> int:
        """Prompt tokens that will be computed before those of a prompt that comes now."""
        return self.report.num_waiting_tokens + self.num_pending_tokens

    def wait(self, default_rate: float) -> float:
        """Predicted seconds until a prompt that comes now is started."""
        rate = self.report.prefill_rate or default_rate
        return self.num_tokens_ahead / rate if rate > 0 else 0.0

    def first_token(self, now: float, num_tokens: int, default_rate: float) -> float:
        """Predicted seconds until ``num_tokens`` of a prompt that comes now are computed, and those before them."""
        rate = self.report.prompt_rate or default_rate
        return max(0.0, self.done_at - now) + (num_tokens / rate if rate > 0 else 0.0)

    def interval(self, now: float, num_tokens: int = 0) -> float:
        """Predicted seconds between tokens of a sequence that runs here, with ``num_tokens`` of a prompt on top."""
        report, recent = self.report, self.recent
        return interval(report.step_seconds, report.prompt_seconds, recent.at(now) + num_tokens, recent.window)

    @property
    def num_free_blocks(self) -> int:
        """Blocks free by the last report, less what was promised since and what prompts that wait will take."""
        blocks = sum([work.blocks for work in self.assigned.values()])
        if self.spec.role is Role.MIXED:
            blocks += self.spec.kv.blocks_for(self.num_tokens_ahead)
        return self.report.num_free_blocks - blocks

    @property
    def num_free_slots(self) -> int:
        """Places in the batch, less those promised since."""
        report = self.report
        used = report.num_running + report.num_waiting + len(self.assigned)
        return self.spec.scheduler.max_batch_size - used

    @property
    def is_idle(self) -> bool:
        """Nothing there and nothing on its way."""
        return self.report.num_running == 0 and self.report.num_waiting == 0 and not self.assigned

    @property
    def num_requests(self) -> int:
        """Requests there and on their way."""
        return self.report.num_waiting + self.report.num_running + len(self.assigned)

    def has_room_for_prompt(self, num_tokens: int, num_choices: int) -> bool:
        """Whether a prompt with ``num_tokens`` to compute would wait for nothing but those before it."""
        if self.is_idle:
            return True
        kv = self.spec.kv
        needed = kv.blocks_for(num_tokens + self.num_tokens_ahead)
        needed += sum([work.blocks for work in self.assigned.values()])
        has_slot = self.spec.role is not Role.MIXED or self.num_free_slots >= num_choices
        return has_slot and needed + self.headroom <= self.report.num_free_blocks
