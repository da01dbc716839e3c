"""Who may ask: whoever has the API key, or anybody where there is none."""

import hmac

from fastapi import Request

from distserve.api.errors import AuthenticationError
from distserve.api.settings import ApiSettings


def check_key(request: Request, settings: ApiSettings) -> None:
    """Raise AuthenticationError unless the request has the key that ``settings`` want."""
    if settings.api_key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), settings.api_key.encode()):
        raise AuthenticationError("the API key is missing or wrong: send Authorization: Bearer <key>")
