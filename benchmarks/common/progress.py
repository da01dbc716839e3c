"""Progress of measurements that take long."""

import time


def say(text: str) -> None:
    """Show it, with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
