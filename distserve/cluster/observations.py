"""What an API process lets others see of its requests: when they come, and how long they are.

For whoever compares the load with the one that was planned for. No contents pass through here.
"""

from typing import Protocol


class Observer(Protocol):
    """Told of every request, in the event loop: must return at once."""

    def arrived(self, request_id: str, time: float, num_prompt_tokens: int) -> None:
        """A request was submitted at ``time`` (seconds on the cluster clock)."""
        ...

    def ended(self, request_id: str, num_output_tokens: int, *, complete: bool) -> None:
        """A request has ended with so many tokens in its longest choice; ``complete``: it was served to its end."""
        ...
