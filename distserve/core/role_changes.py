"""The router's part in a change of an instance's role: whether it may be, and what becomes of what it knows.

::

    operator    ChangeRole        the router refuses, with a reason (RoleAnswer 404, 409), or accepts (202)
    router      Become            from here on it assigns the instance nothing
    instance                      ends what it has, or hands it back: :mod:`distserve.core.instance_machine`
    instance    Report            names the new role: the router assigns again

Every report names the role and what it is to become, so a router that is new learns of a change under way, too.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace

from distserve.core.budget import check_budget
from distserve.core.config import Role
from distserve.core.errors import ConfigError
from distserve.core.hybrid import RecentTokens
from distserve.core.instance_view import InstanceView
from distserve.core.messages import ChangeRole, Report

PATIENCE = 30.0
"""Seconds that an instance ends its requests in before it changes its role, unless said otherwise."""


def refusal(instances: Mapping[str, InstanceView], change: ChangeRole) -> tuple[int, str] | None:
    """(status, reason) if the change cannot be: of an unknown instance (404), or as things stand (409)."""
    name, role = change.instance_id, change.role
    view = instances.get(name)
    if view is None:
        return 404, f"no instance is called {name}; there are {', '.join(instances) or 'none'}"
    if view.becoming is not None:
        return 409, f"{name} is about to become a {view.becoming} instance already: wait until it is"
    if view.spec.role is role:
        return 409, f"{name} is a {role} instance already"
    if view.is_draining:
        return 409, f"{name} takes no more requests"
    try:
        check_budget(replace(view.spec, role=role))
    except ConfigError as error:
        return 409, str(error)
    staying = [other for other in instances.values() if not other.is_draining]
    if _can_serve(staying) and not _can_serve([other for other in staying if other is not view]):
        return 409, (
            f"{name} is the last {view.spec.role} instance: until it has changed no request could be served. Change or "
            "start another one first"
        )
    return None


def _can_serve(views: Collection[InstanceView]) -> bool:
    roles = {view.spec.role for view in views}
    return Role.MIXED in roles or {Role.PREFILL, Role.DECODE} <= roles


def begin(view: InstanceView, role: Role) -> None:
    """The instance is told to become ``role``: it gets nothing new until it is."""
    view.is_draining = True
    view.becoming = role
    view.report = replace(view.report, becoming=role)


def follow(view: InstanceView, report: Report) -> bool:
    """Take what the instance says of its role; whether that changes who takes which requests."""
    if report.role is not None and report.role is not view.spec.role:
        view.spec = replace(view.spec, role=report.role)
        view.becoming = report.becoming
        view.is_draining = report.becoming is not None
        # What it was given for its former role has ended, or will be turned away when it comes.
        view.assigned.clear()
        view.recent = RecentTokens(view.recent.window)
        view.done_at = 0.0
        return True
    if report.becoming is not None and view.becoming is None:
        begin(view, report.becoming)
        return True
    if view.becoming is not None and report.becoming is None:
        view.report = replace(report, becoming=view.becoming)  # it has not been told yet
    return False
