"""The exception tree. Everything a user can cause is raised from here; bugs are asserts.

::

    DistserveError
    ├── ConfigError            a file, flag or model directory is wrong; says which key and what would be valid
    │   └── UnsupportedModelError   the model cannot be served exactly; says why
    ├── RequestError           one request is at fault; ``status`` is the HTTP status that tells the client
    │   ├── InvalidRequestError     400: the request can never be served as it is
    │   ├── NotFoundError           404: unknown model
    │   │   └── UnknownInstanceError    404: no instance of that name
    │   ├── ConflictError           409: the cluster is in no state for it; says why
    │   ├── OverloadedError         429: shed at admission; ``retry_after`` seconds
    │   └── UnavailableError        503: no instance can take it now, or it was lost more often than allowed
    ├── TransferError          a KV migration failed; the request is pulled again or recomputed
    └── InstanceError          an instance cannot start or has died; carries the cause
"""


class DistserveError(Exception):
    """Root of all errors this package raises on purpose."""


class ConfigError(DistserveError):
    """A configuration, flag or model directory is wrong."""


class UnsupportedModelError(ConfigError):
    """The model cannot be served exactly; the message says why."""


class RequestError(DistserveError):
    """One request is at fault; ``status`` is the HTTP status code, ``param`` the offending field if known."""

    status = 400

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequestError(RequestError):
    """The request can never be served as it is."""


class NotFoundError(RequestError):
    """The request names a model that is not served here."""

    status = 404


class UnknownInstanceError(NotFoundError):
    """There is no instance of that name."""


class ConflictError(RequestError):
    """The cluster is in no state to do it; the message says why."""

    status = 409


class OverloadedError(RequestError):
    """Shed at admission: come back after ``retry_after`` seconds."""

    status = 429

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class UnavailableError(RequestError):
    """No instance can take the request now, or it was lost more often than allowed."""

    status = 503


class TransferError(DistserveError):
    """A KV migration failed."""


class InstanceError(DistserveError):
    """An instance cannot start or has died."""
