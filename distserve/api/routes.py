"""The paths of the API and what each does."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import PlainTextResponse, Response

import distserve
from distserve.api.answer import Answer
from distserve.api.backend import Backend
from distserve.api.body import read_body
from distserve.api.echo import decode
from distserve.api.error_responses import envelope
from distserve.api.health import health
from distserve.api.job import chat_job, check_model, completion_job
from distserve.api.keys import check_key
from distserve.api.metrics import CONTENT_TYPE, Metrics
from distserve.api.model import ServedModel
from distserve.api.prompts import conversation_prompt, encode, require_tokenizer
from distserve.api.sampling import check_token_ids
from distserve.api.schemas import Body, ChatBody, CompletionBody, DetokenizeBody, ErrorBody, TokenizeBody
from distserve.api.settings import ApiSettings
from distserve.core.errors import InvalidRequestError, RequestError


@dataclass(frozen=True, slots=True)
class Service:
    """What the routes work with."""

    backend: Backend
    model: ServedModel
    settings: ApiSettings
    metrics: Metrics
    clock: Callable[[], float]


def _json(content: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")


def _described(schema: type[BaseModel]) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema.__name__}"}}}}


def takes(schema: type[Body]) -> dict[str, Any]:
    """OpenAPI's description of a body that the route reads itself."""
    return {"requestBody": {"required": True, **_described(schema)}}


_RESPONSES: dict[int | str, dict[str, Any]] = {"default": {"description": "An error", **_described(ErrorBody)}}
_STREAMS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer, or a stream of server-sent events that end with [DONE]",
        "content": {"application/json": {}, "text/event-stream": {}},
    }
}


def build_router(service: Service) -> APIRouter:
    """All routes, bound to ``service``."""
    router = APIRouter(responses=_RESPONSES)
    backend, model, settings = service.backend, service.model, service.settings
    limit = settings.max_body_bytes

    def authorise(request: Request) -> None:
        check_key(request, settings)

    def describe(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": model.created,
            "owned_by": "distserve",
            "root": model.names[0],
            "parent": None,
            "max_model_len": model.max_model_len,
            "vocab_size": model.vocab_size,
        }

    @router.post("/v1/completions", openapi_extra=takes(CompletionBody), responses=_STREAMS)
    async def completions(request: Request) -> Response:
        """Continue one or several prompts."""
        return await generate(request, CompletionBody)

    @router.post("/v1/chat/completions", openapi_extra=takes(ChatBody), responses=_STREAMS)
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        return await generate(request, ChatBody)

    async def generate(request: Request, schema: type[CompletionBody] | type[ChatBody]) -> Response:
        arrival = service.clock()
        try:
            authorise(request)
            body = await read_body(request, schema, limit)
            if isinstance(body, ChatBody):
                job = await chat_job(body, model, backend.owner_id, settings.max_choices, arrival)
            else:
                job = await completion_job(body, model, backend.owner_id, settings.max_choices, arrival)
        except RequestError as error:
            service.metrics.on_outcome(str(error.status))
            raise
        return Answer(job, backend, service.metrics, service.clock)

    @router.get("/v1/models")
    async def models(request: Request) -> Response:
        """The model served, under each of its names."""
        authorise(request)
        return _json({"object": "list", "data": [describe(name) for name in model.names]})

    @router.get("/v1/models/{name:path}")
    async def one_model(request: Request, name: str) -> Response:
        """One of the names."""
        authorise(request)
        return _json(describe(check_model(name, model)))

    @router.post("/tokenize", openapi_extra=takes(TokenizeBody))
    async def tokenize(request: Request) -> Response:
        """The tokens of a text or of a conversation."""
        authorise(request)
        body = await read_body(request, TokenizeBody, limit)
        check_model(body.model, model)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequestError("send either prompt or messages", param="prompt")
        tokenizer = require_tokenizer(model, "prompt")
        if body.prompt is None:
            ids = (await conversation_prompt(body, model)).token_ids
        else:
            ids = await encode(body.prompt, model, "prompt", add_special_tokens=body.add_special_tokens is not False)
        strings = [tokenizer.vocabulary_token(i) for i in ids] if body.return_token_strs else None
        return _json({"count": len(ids), "max_model_len": model.max_model_len, "tokens": ids, "token_strs": strings})

    @router.post("/detokenize", openapi_extra=takes(DetokenizeBody))
    async def detokenize(request: Request) -> Response:
        """The text of tokens."""
        authorise(request)
        body = await read_body(request, DetokenizeBody, limit)
        check_model(body.model, model)
        tokenizer = require_tokenizer(model, "tokens")
        check_token_ids(body.tokens, model, "tokens")
        return _json({"prompt": await decode(body.tokens, tokenizer)})

    @router.get("/health")
    async def healthy() -> Response:
        """200 if every pool can serve, else 503 and which cannot."""
        code, content = health(backend.status())
        if code != 200:
            content |= msgspec.json.decode(envelope(code, content["reason"], code="service_unavailable"))
        return _json(content, code)

    @router.get("/version")
    async def version() -> Response:
        """This program's version."""
        return _json({"version": distserve.__version__})

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(service.metrics.expose(), media_type=CONTENT_TYPE)

    return router
