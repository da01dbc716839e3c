"""Requests made up from the app's own OpenAPI description, fitting it and not: never a 5xx, always an envelope."""

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import Case
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from distserve.api.app import create_app
from distserve.api.model import load_served_model
from distserve.api.settings import ApiSettings
from tests.api.conftest import MODEL_DIR, Server, Start, backend_for

MODEL = load_served_model(MODEL_DIR, names=("demo",))
DESCRIPTION = create_app(backend_for(MODEL), MODEL, ApiSettings()).openapi()
CONFIG = SchemathesisConfig.from_dict({"generation": {"mode": "all"}})

schema = schemathesis.openapi.from_dict(DESCRIPTION, config=CONFIG)


@pytest.fixture(scope="module")
def fuzzed(start: Start) -> Server:
    return start(backend_for(MODEL), MODEL)


@schema.parametrize()
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_is_sent(case: Case, fuzzed: Server) -> None:
    response = case.call(base_url=fuzzed.url)
    case.validate_response(
        response,
        checks=[
            not_a_server_error,
            status_code_conformance,
            content_type_conformance,
            response_schema_conformance,
        ],
    )
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_the_description_names_every_path() -> None:
    paths = {"/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/{name}", "/tokenize", "/detokenize"}
    assert set(DESCRIPTION["paths"]) == paths | {"/health", "/version", "/metrics"}
    assert "CompletionBody" in DESCRIPTION["components"]["schemas"]


def test_the_server_still_serves(fuzzed: Server) -> None:
    assert fuzzed.complete(max_tokens=2)["usage"]["completion_tokens"] == 2
