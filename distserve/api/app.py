"""The HTTP application: routes, error handlers and the OpenAPI description of what they take.

One app belongs to one process and one backend; a second process has an app and requests of its own.
"""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import distserve
from distserve.api.admin import Operator, RoleBody, build_admin_router
from distserve.api.backend import Backend
from distserve.api.error_responses import HANDLERS
from distserve.api.metrics import Metrics
from distserve.api.model import ServedModel
from distserve.api.routes import Service, build_router
from distserve.api.schemas import DESCRIBED
from distserve.api.settings import ApiSettings
from distserve.api.timeline import wall_clock

DESCRIPTION = (
    "OpenAI's completions and chat API with vLLM's extensions. Errors are `{error: {message, type, param, code}}`."
)


def create_app(
    backend: Backend,
    model: ServedModel,
    settings: ApiSettings,
    *,
    clock: Callable[[], float] = wall_clock,
    operator: Operator | None = None,
) -> FastAPI:
    """The application that serves ``model`` through ``backend``.

    ``clock`` is the cluster's (seconds), which instances stamp their marks with. ``operator`` does what is asked below
    ``/admin``; None: there are no such paths.
    """
    metrics = Metrics(model.names[0], backend.status)
    app = FastAPI(
        title="distserve",
        version=distserve.__version__,
        description=DESCRIPTION,
        exception_handlers=HANDLERS,
        redirect_slashes=False,
    )
    app.include_router(build_router(Service(backend, model, settings, metrics, clock)))
    described: tuple[type[BaseModel], ...] = DESCRIBED
    if operator is not None:
        app.include_router(build_admin_router(operator, backend, settings))
        described = (*described, RoleBody)

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            _, definitions = models_json_schema(
                [(body, "validation") for body in described], ref_template="#/components/schemas/{model}"
            )
            schema.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # the way FastAPI documents
    return app
