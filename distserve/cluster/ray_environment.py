"""Ray settings that only the environment can carry; Ray reads them when first imported, so nothing here imports it."""

import os
import secrets
import sys
from pathlib import Path

_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_memory_monitor_refresh_ms": "0",  # memory is planned here; Ray's watcher would kill for other tenants' use
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TQDM_PATCH_PRINT": "0",
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",  # its stack traces would greet whoever stops the server
}


def prepare_ray_environment(address: str | None) -> None:
    """Set what a local Ray cluster, or the one at ``address``, should run with. Call before anything imports Ray.

    A local cluster gets a secret token of its own: Ray's processes listen on every interface, and whoever may speak to
    them may run code. A program that has imported Ray already has to see to that itself.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    if "ray" in sys.modules:
        return
    if address is None:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    elif _has_token():
        # `ray start` turns authentication on where there is a token; a driver that joins has to say so itself.
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _has_token() -> bool:
    """Whether there is a token where Ray looks for one."""
    given = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
    return given or (Path.home() / ".ray" / "auth_token").is_file()
