"""Whether every pool a request has to pass is able to serve."""

from typing import Any

from distserve.core.config import Role
from distserve.core.messages import Status


def pool_sizes(status: Status | None) -> dict[str, dict[str, int]]:
    """``instances`` per role that has any, and how many of them are ``changing`` to another, if any are."""
    sizes: dict[str, dict[str, int]] = {}
    for spec, report in status.instances if status is not None else ():
        size = sizes.setdefault(spec.role.value, {"instances": 0})
        size["instances"] += 1
        if report.becoming is not None:
            size["changing"] = size.get("changing", 0) + 1
    return sizes


def missing_pools(status: Status | None) -> list[str]:
    """Pools without which no request can be served; none are missing where mixed instances do everything.

    An instance that is about to change its role takes no requests.
    """
    roles = {spec.role for spec, report in status.instances if report.becoming is None} if status is not None else set()
    if Role.MIXED in roles:
        return []
    return [role.value for role in (Role.PREFILL, Role.DECODE) if role not in roles]


def health(status: Status | None) -> tuple[int, dict[str, Any]]:
    """HTTP status and body of ``/health``."""
    pools = pool_sizes(status)
    if status is None:
        return 503, {"status": "unavailable", "pools": pools, "reason": "the router has not answered yet"}
    if missing := missing_pools(status):
        reason = f"no live instance in: {', '.join(missing)}"
        return 503, {"status": "unavailable", "pools": pools, "missing": missing, "reason": reason}
    return 200, {"status": "ok", "pools": pools}
