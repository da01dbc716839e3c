"""What an operator can set about the HTTP side."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """Limits of one API process.

    ``max_body_bytes`` bounds a request body; ``max_choices`` prompts times n of one HTTP request. With an
    ``api_key`` every path but /health, /version, /metrics and those that describe the API wants ``Authorization:
    Bearer <key>``.
    """

    api_key: str | None = None
    max_body_bytes: int = 8 * 2**20
    max_choices: int = 1024
