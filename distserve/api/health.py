"""Whether every pool a request has to pass is able to serve."""

from typing import Any

from distserve.core.config import Role
from distserve.core.messages import Status


def pool_sizes(status: Status | None) -> dict[str, int]:
    """Live instances per role that has any."""
    sizes: dict[str, int] = {}
    for spec, _ in status.instances if status is not None else ():
        sizes[spec.role.value] = sizes.get(spec.role.value, 0) + 1
    return sizes


def missing_pools(status: Status | None) -> list[str]:
    """Pools without which no request can be served; none are missing where mixed instances do everything."""
    sizes = pool_sizes(status)
    if Role.MIXED in sizes:
        return []
    return [role.value for role in (Role.PREFILL, Role.DECODE) if role not in sizes]


def health(status: Status | None) -> tuple[int, dict[str, Any]]:
    """HTTP status and body of ``/health``."""
    pools = {name: {"instances": count} for name, count in pool_sizes(status).items()}
    if status is None:
        return 503, {"status": "unavailable", "pools": pools, "reason": "the router has not answered yet"}
    if missing := missing_pools(status):
        reason = f"no live instance in: {', '.join(missing)}"
        return 503, {"status": "unavailable", "pools": pools, "missing": missing, "reason": reason}
    return 200, {"status": "ok", "pools": pools}
