"""What the router knows of one instance: its last report, and what it was given since."""

from dataclasses import dataclass, field

from distserve.core.config import InstanceSpec, Role
from distserve.core.messages import Report, RequestKey
from distserve.core.routed_prefixes import RoutedPrefixes


@dataclass(slots=True)
class InstanceView:
    """What the router knows of one instance.

    ``assigned`` is work given to it that no report has named yet: tokens to compute (prefill) or blocks (decode), and
    the part it comes through. ``prefixes`` is what its prefix cache should hold; None if that is of no interest.
    """

    spec: InstanceSpec
    report: Report
    heard_at: float
    assigned: dict[RequestKey, tuple[int, str]] = field(default_factory=dict)
    is_draining: bool = False
    becoming: Role | None = None
    """The role it changes to; it is draining until it has."""
    prefixes: RoutedPrefixes | None = None

    @classmethod
    def fresh(cls, spec: InstanceSpec, now: float, *, remembers: bool) -> "InstanceView":
        """An instance that has just come up and has said nothing; ``remembers``: what it is sent is to be noted."""
        prefixes = RoutedPrefixes(spec.kv.num_blocks) if remembers else None
        return cls(spec, Report(spec.instance_id, 0, 0, 0, spec.kv.num_blocks), now, prefixes=prefixes)

    def note(self, report: Report, now: float) -> None:
        """Take a report: the attempts it names are in its figures now."""
        self.report = report
        self.heard_at = now
        for key in report.seen:
            self.assigned.pop(key, None)

    @property
    def num_pending(self) -> int:
        """Tokens (prefill) or blocks (decode) assigned and not yet reported."""
        return sum(amount for amount, _ in self.assigned.values())

    def wait(self, default_rate: float) -> float:
        """Predicted seconds until a prompt that comes now is started."""
        rate = self.report.prefill_rate or default_rate
        return (self.report.num_waiting_tokens + self.num_pending) / rate if rate > 0 else 0.0

    @property
    def num_free_blocks(self) -> int:
        """Blocks free by the last report, less what was promised since."""
        return self.report.num_free_blocks - self.num_pending

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
        needed = kv.blocks_for(num_tokens + self.report.num_waiting_tokens + self.num_pending)
        headroom = int(self.spec.scheduler.headroom * kv.num_blocks)
        has_slot = self.spec.role is not Role.MIXED or self.num_free_slots >= num_choices
        return has_slot and needed + headroom <= self.report.num_free_blocks
