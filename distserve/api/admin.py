"""What an operator can see and say of a running deployment: which instances there are, and which role each has.

Nothing here is for clients. Where the endpoint has no API key, only this machine is answered.
"""

import ipaddress
from typing import Any, Protocol

import msgspec
from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from distserve.api.backend import Backend
from distserve.api.body import read_body
from distserve.api.errors import ForbiddenError
from distserve.api.keys import check_key
from distserve.api.routes import takes
from distserve.api.schemas import Body
from distserve.api.settings import ApiSettings
from distserve.core.config import Role
from distserve.core.errors import UnavailableError
from distserve.core.role_changes import PATIENCE

_LONGEST_PATIENCE = 86_400.0


class Operator(Protocol):
    """Does what an operator wants."""

    async def change_role(self, instance_id: str, role: Role, patience: float) -> None:
        """Have an instance become ``role`` while it serves; returns when that is agreed, before it has happened.

        What it has not ended after ``patience`` seconds goes on elsewhere. Raises UnknownInstanceError (404),
        ConflictError (409, with the reason) or UnavailableError (503).
        """
        ...


class RoleBody(Body):
    """The role an instance is to have."""

    role: Role = Field(description="prefill, decode or mixed")
    patience: float = Field(
        PATIENCE,
        ge=0,
        le=_LONGEST_PATIENCE,
        description="Seconds to end what the instance has; what is left then goes on elsewhere.",
    )


def build_admin_router(operator: Operator, backend: Backend, settings: ApiSettings) -> APIRouter:
    """The paths below ``/admin``."""
    router = APIRouter(prefix="/admin")

    def authorise(request: Request) -> None:
        check_key(request, settings)
        if settings.api_key is None and not _is_local(request):
            raise ForbiddenError("without an API key only this machine may do that: start with --api-key")

    def instances() -> list[dict[str, Any]]:
        status = backend.status()
        if status is None:
            raise UnavailableError("the router has not answered yet")
        return [
            {
                "name": spec.instance_id,
                "role": spec.role.value,
                "becoming": report.becoming.value if report.becoming is not None else None,
                "num_waiting": report.num_waiting,
                "num_running": report.num_running,
                "kv_cache_usage": round(1 - report.num_free_blocks / spec.kv.num_blocks, 6),
            }
            for spec, report in sorted(status.instances, key=lambda instance: instance[0].instance_id)
        ]

    @router.get("/instances")
    async def list_instances(request: Request) -> Response:
        """Every instance: its role, what it is about to become, its load."""
        authorise(request)
        return _json({"instances": instances()})

    @router.post("/instances/{name}/role", status_code=202, openapi_extra=takes(RoleBody))
    async def change_role(request: Request, name: str) -> Response:
        """Let an instance change its role while it serves. 202: it gets no new requests until it has."""
        authorise(request)
        body = await read_body(request, RoleBody, settings.max_body_bytes)
        await operator.change_role(name, body.role, body.patience)
        return _json({"name": name, "becoming": body.role.value}, 202)

    return router


def _is_local(request: Request) -> bool:
    if request.client is None:
        return False
    try:
        return ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False


def _json(content: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")
