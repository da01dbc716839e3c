"""How long an instance's steps take of late: what the router predicts waits with."""

_SHARE = 0.2
"""Of the newest step in a mean over steps."""


class Pace:
    """Figures of steps that have ended, in seconds and tokens; 0 before there are any.

    Steps with prompts are exponential means: ``prefill_rate`` (all their tokens per second), ``prompt_step_seconds``
    and ``prompt_step_tokens`` (of prompts). ``step_seconds`` is what the last step without prompts took: that is of
    the batch that runs now.
    """

    def __init__(self) -> None:
        self.prefill_rate = 0.0
        self.step_seconds = 0.0
        self.prompt_step_seconds = 0.0
        self.prompt_step_tokens = 0.0
        self._last_end = 0.0

    def count(self, start: float, end: float, num_tokens: int, num_prompt_tokens: int, *, is_queued: bool) -> None:
        """Take a step in that was launched at ``start`` and has ended at ``end``.

        ``is_queued``: under lookahead a step is launched, but does not start, before the one before it has ended.
        """
        elapsed = end - start
        if elapsed > 0 and num_prompt_tokens > 0:
            rate = num_tokens / elapsed
            share = _SHARE if self.prefill_rate else 1.0
            self.prefill_rate = (1 - share) * self.prefill_rate + share * rate
        seconds = end - max(start, self._last_end) if is_queued else elapsed
        self._last_end = end
        if num_prompt_tokens == 0:
            self.step_seconds = seconds
        else:
            share = _SHARE if self.prompt_step_tokens else 1.0
            self.prompt_step_seconds += share * (seconds - self.prompt_step_seconds)
            self.prompt_step_tokens += share * (num_prompt_tokens - self.prompt_step_tokens)
