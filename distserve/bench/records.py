"""What is kept of one request. Times are seconds since the start of its run, on the client's monotonic clock."""

from array import array
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """How a request ended."""

    PENDING = "pending"
    OK = "ok"
    SHED = "shed"
    """The server refused it for load: 429, or 503 with Retry-After."""
    FAILED = "failed"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    """Cut off by us, because the run was interrupted or decided early; neither met nor missed."""


@dataclass(slots=True)
class RequestRecord:
    """One request, filled in while it runs.

    ``scheduled`` is when it should have been sent; every latency counts from there, so that a client or a connection
    that falls behind shows as latency instead of hiding it (coordinated omission). ``event_times`` and
    ``event_tokens`` hold the token-bearing events. ``count_source`` says where ``num_output_tokens`` comes from:
    ``usage``, ``token_ids`` or ``events``.
    """

    index: int
    scheduled: float
    prompt_len: int
    """Prompt tokens asked for."""
    output_len: int
    """Output tokens asked for."""
    sent: float = float("nan")
    end: float = float("nan")
    status: Status = Status.PENDING
    error: str = ""
    http_status: int | None = None
    num_prompt_tokens: int | None = None
    """Prompt tokens as the server counted them."""
    num_output_tokens: int = 0
    count_source: str = ""
    event_times: "array[float]" = field(default_factory=lambda: array("d"))
    event_tokens: "array[int]" = field(default_factory=lambda: array("i"))
    timeline: dict[str, Any] | None = None

    @property
    def ttft(self) -> float | None:
        """Seconds from the scheduled arrival to the first token; None before it."""
        return self.event_times[0] - self.scheduled if self.event_times else None

    @property
    def tpot(self) -> float | None:
        """(last - first token) / (n - 1) seconds; None with fewer than two tokens."""
        if self.num_output_tokens < 2 or not self.event_times:
            return None
        return (self.event_times[-1] - self.event_times[0]) / (self.num_output_tokens - 1)

    @property
    def latency(self) -> float | None:
        """Seconds from the scheduled arrival to the last token; None without one."""
        return self.event_times[-1] - self.scheduled if self.event_times else None

    def meets(self, ttft: float, tpot: float) -> bool:
        """Did it succeed within both limits? The TPOT of a one-token output is met."""
        if self.status is not Status.OK:
            return False
        first, pace = self.ttft, self.tpot
        return first is not None and first <= ttft and (pace is None or pace <= tpot)
