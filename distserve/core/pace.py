"""How long an instance's steps take of late: what the router predicts waits and intervals with."""

_SHARE = 0.2
"""Of the newest step in a mean over steps."""


class Pace:
    """Figures of steps that have ended, in seconds and tokens; 0 before there are any.

    ``prefill_rate`` is an exponential mean over steps with prompts: all their tokens per second. ``step_seconds`` is
    what the last step without prompts took from its start to its tokens: that is of the batch that runs now.

    Steps may overlap, queued behind one another under lookahead or in different stages of a pipeline. What a step adds
    to the time until the next one's tokens come, and so what rates are made of, is how long after the step before it
    ended; alone that is all it took.
    """

    def __init__(self) -> None:
        self.prefill_rate = 0.0
        self.step_seconds = 0.0
        self._added = 0.0
        self._prompt_step_added = 0.0
        self._prompt_step_tokens = 0.0
        self._last_end = 0.0

    def count(self, start: float, end: float, num_tokens: int, num_prompt_tokens: int, *, is_queued: bool) -> None:
        """Take a step in that was launched at ``start`` and has ended at ``end``.

        ``is_queued``: under lookahead a step is launched, but does not start, before the one before it has ended.
        """
        added = end - max(start, self._last_end)
        self._last_end = end
        if num_prompt_tokens == 0:
            self._added = added
            self.step_seconds = added if is_queued else end - start
            return
        if added > 0:
            share = _SHARE if self.prefill_rate else 1.0
            self.prefill_rate = (1 - share) * self.prefill_rate + share * (num_tokens / added)
        share = _SHARE if self._prompt_step_tokens else 1.0
        self._prompt_step_added += share * (added - self._prompt_step_added)
        self._prompt_step_tokens += share * (num_prompt_tokens - self._prompt_step_tokens)

    def count_alike(self, seconds: float, end: float) -> None:
        """Take in steps without prompts, none beside another; the last took ``seconds`` and ended at ``end``."""
        self._added = self.step_seconds = seconds
        self._last_end = end

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens per second in steps with prompts, beside whatever decodes in them."""
        return self._prompt_step_tokens / self._prompt_step_added if self._prompt_step_added > 0 else 0.0

    @property
    def prompt_seconds(self) -> float:
        """By how much a prompt token lengthens a step."""
        longer = max(0.0, self._prompt_step_added - self._added)
        return longer / self._prompt_step_tokens if self._prompt_step_tokens > 0 else 0.0
