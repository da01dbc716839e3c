"""What an instance has counted since it started, whatever roles it had."""


class Totals:
    """Counts, bytes and seconds, for the router's reports and a simulation's results."""

    def __init__(self) -> None:
        self.num_preempted = 0
        """Running sequences that lost their memory to older ones."""
        self.num_queried_tokens = 0
        """Tokens that were looked up in the prefix cache."""
        self.num_hit_tokens = 0
        """Those of them that were neither computed nor pulled, because their KV was there."""
        self.num_pulls = 0
        self.pulled_bytes = 0
        self.pull_seconds = 0.0
        self.num_role_changes = 0
