"""Errors as OpenAI's clients expect them: ``{"error": {message, type, param, code}}`` with the right status.

Every error response of the app passes through here, whatever raised it.
"""

import math
from typing import Any

import msgspec
from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from distserve.api.errors import AuthenticationError, BodyTooLargeError, ContextLengthError
from distserve.core.errors import NotFoundError, OverloadedError, RequestError, UnavailableError

_CODES: dict[type[RequestError], str] = {
    ContextLengthError: "context_length_exceeded",
    NotFoundError: "model_not_found",
    AuthenticationError: "invalid_api_key",
    BodyTooLargeError: "request_too_large",
    OverloadedError: "rate_limit_exceeded",
    UnavailableError: "service_unavailable",
}


def error_type(status: int) -> str:
    """OpenAI's ``type`` for an HTTP status."""
    if status == 401:
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def envelope(status: int, message: str, *, param: str | None = None, code: str | None = None) -> bytes:
    """The error object as JSON."""
    return msgspec.json.encode(
        {"error": {"message": message, "type": error_type(status), "param": param, "code": code}}
    )


def error_body(error: RequestError) -> bytes:
    """The envelope of a RequestError."""
    return envelope(error.status, error.message, param=error.param, code=_CODES.get(type(error)))


def error_response(error: RequestError) -> Response:
    """The HTTP response that tells a client about ``error``."""
    headers = {}
    if isinstance(error, OverloadedError):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, AuthenticationError):
        headers["www-authenticate"] = "Bearer"
    return Response(error_body(error), error.status, headers, "application/json")


async def on_request_error(_: Request, error: Exception) -> Response:
    """Handler for RequestError."""
    assert isinstance(error, RequestError)
    return error_response(error)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Handler for the framework's own errors: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    message = {
        404: f"no such path: {request.method} {request.url.path}",
        405: f"{request.url.path} does not take {request.method}",
    }.get(error.status_code, str(error.detail))
    body = envelope(error.status_code, message)
    return Response(body, error.status_code, dict(error.headers or {}), "application/json")


async def on_client_disconnect(_: Request, __: Exception) -> Response:
    """Handler for a client that left while sending its body: nobody reads this."""
    return Response(status_code=400)


async def on_exception(_: Request, __: Exception) -> Response:
    """Handler for bugs, told in general; the framework raises them on to the server, which logs them."""
    # The server closes the connection after an exception; the client should know.
    headers = {"connection": "close"}
    return Response(envelope(500, "internal server error"), 500, headers, media_type="application/json")


HANDLERS: dict[Any, Any] = {
    RequestError: on_request_error,
    HTTPException: on_http_exception,
    ClientDisconnect: on_client_disconnect,
    Exception: on_exception,
}
