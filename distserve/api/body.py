"""Read and validate a JSON body without ever holding more of it than allowed."""

import json
from typing import TypeVar

from fastapi import Request
from pydantic import ValidationError

from distserve.api.errors import BodyTooLargeError, MediaTypeError, validation_error
from distserve.api.schemas import UNSUPPORTED, Body
from distserve.core.errors import InvalidRequestError

BodyT = TypeVar("BodyT", bound=Body)


async def _read_limited(request: Request, limit: int) -> bytes:
    too_large = BodyTooLargeError(f"the body is larger than {limit} bytes")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise too_large
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise too_large
        chunks.append(chunk)
    return b"".join(chunks)


async def read_body(request: Request, schema: type[BodyT], limit: int) -> BodyT:
    """The request's body as ``schema``.

    A body must be declared as JSON: browsers then ask before they post across sites. Raises MediaTypeError,
    BodyTooLargeError and InvalidRequestError.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise MediaTypeError("send the body as JSON, with the header Content-Type: application/json")
    data = await _read_limited(request, limit)
    try:
        body = schema.model_validate_json(data)
    except ValidationError as error:
        raise validation_error(error, _parsed(data)) from error
    for name in UNSUPPORTED.keys() & (body.model_extra or {}).keys():
        if (body.model_extra or {})[name] not in UNSUPPORTED[name]:
            raise InvalidRequestError(f"{name} is not supported", param=name)
    return body


def _parsed(data: bytes) -> object:
    """The body for looking up where an error is; None if it is not JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None
