"""Errors as OpenAI's clients expect them: ``{"error": {message, type, param, code}}`` with the right status.

Every error response of the app passes through here, whatever raised it.
"""

import math
from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import Request
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from distserve.core.errors import InvalidRequestError, NotFoundError, OverloadedError, RequestError, UnavailableError


class ContextLengthError(InvalidRequestError):
    """Prompt and output do not fit the model's context."""


class AuthenticationError(RequestError):
    """The API key is missing or wrong."""

    status = 401


class BodyTooLargeError(RequestError):
    """The body exceeds the limit; it has not been read to its end."""

    status = 413


class MediaTypeError(RequestError):
    """The body is not declared as JSON."""

    status = 415


class ServingError(RequestError):
    """The request failed on the server's side after it was admitted."""

    status = 500


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


def error_of_status(status: int, reason: str, retry_after: float = 0.0) -> RequestError:
    """The error that a cluster's verdict (HTTP status and reason) amounts to."""
    if status == 400:
        return InvalidRequestError(reason)
    if status == 429:
        return OverloadedError(reason, retry_after=retry_after)
    if status == 503:
        return UnavailableError(reason)
    return ServingError(reason)


def _follow(loc: Sequence[int | str], value: object, *, missing: bool) -> tuple[int, str]:
    """How far a validation error's location leads into the body ``value``, and the path: ``messages[0].role``.

    Pydantic inserts the branches of unions into locations: an element that cannot be followed names a branch, unless
    it is the last one and a ``missing`` field.
    """
    depth, path = 0, ""
    for i, element in enumerate(loc):
        if isinstance(element, int) and isinstance(value, list) and element < len(value):
            path += f"[{element}]"
            value = value[element]
        elif isinstance(value, dict) and (element in value or (missing and i == len(loc) - 1)):
            path += f".{element}" if path else str(element)
            value = value.get(element)
        else:
            continue
        depth += 1
    return depth, path


def validation_error(error: ValidationError, body: object) -> InvalidRequestError:
    """One sentence and one field for what pydantic found wrong with ``body`` (parsed JSON, None if it is none)."""
    details = error.errors(include_url=False, include_context=False, include_input=False)
    first = details[0]
    if first["type"] == "json_invalid":
        return InvalidRequestError(f"the body is not valid JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    if not first["loc"]:
        return InvalidRequestError("the body must be a JSON object")
    # All branches of a union report. Those that got furthest know what the client meant; together they say what
    # would be valid.
    same = [detail for detail in details if detail["loc"][0] == first["loc"][0]]
    located = [(_follow(detail["loc"], body, missing=detail["type"] == "missing"), detail["msg"]) for detail in same]
    (depth, param), _ = max(located, key=lambda entry: entry[0][0])
    prefix = "Input should be "
    messages = list(dict.fromkeys(message for (d, path), message in located if (d, path) == (depth, param)))
    wanted = " or ".join(message.removeprefix(prefix) for message in messages)
    verb = "should be " if all(message.startswith(prefix) for message in messages) else ""
    return InvalidRequestError(f"{param}: {verb}{wanted}", param=param or str(first["loc"][0]))


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
