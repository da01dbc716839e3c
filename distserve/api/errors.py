"""What can be wrong with a request beyond :mod:`distserve.core.errors`, and how it is told in a sentence.

Imports no web framework: use without a server raises the same errors. What clients of the endpoint see of them is
:mod:`distserve.api.error_responses`' business.
"""

from collections.abc import Sequence

from pydantic import ValidationError

from distserve.core.errors import InvalidRequestError, OverloadedError, RequestError, UnavailableError


class ContextLengthError(InvalidRequestError):
    """Prompt and output do not fit the model's context."""


class AuthenticationError(RequestError):
    """The API key is missing or wrong."""

    status = 401


class ForbiddenError(RequestError):
    """Not from there."""

    status = 403


class BodyTooLargeError(RequestError):
    """The body exceeds the limit; it has not been read to its end."""

    status = 413


class MediaTypeError(RequestError):
    """The body is not declared as JSON."""

    status = 415


class ServingError(RequestError):
    """The request failed on the server's side after it was admitted."""

    status = 500


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
