"""The routes of the local HTTP API: OpenAI's under /v1, health, and the proof of the admin key.

`create_app` gives a complete, guarded application; what the command line needs is in `admin.py`.
Page: docs/http-api.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fastapi import FastAPI, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request

from swarmpy.abc import Progress
from swarmpy.errors import ContextExceeded, ModelNotFound
from swarmpy.plugins.gateway import admin
from swarmpy.plugins.gateway.bodies import ChatRequest, ProofRequest
from swarmpy.plugins.gateway.chat import ChatFormats
from swarmpy.plugins.gateway.errors import Refusal
from swarmpy.plugins.gateway.guard import Guard, Traffic, json_response
from swarmpy.plugins.gateway.keys import Keys, proof
from swarmpy.plugins.gateway.replies import ReplyPlan, ReplyResponse
from swarmpy.shards.catalog import ModelEntry

if TYPE_CHECKING:
    from swarmpy.node import Node
    from swarmpy.pipeline.session import Generation


def create_app(node: Node, keys: Keys, *, traffic: Traffic | None = None) -> FastAPI:
    """Return the HTTP application of a node, its guard included.

    Args:
        traffic: Counts its requests and says whether new ones are admitted.
    """
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    traffic = traffic or Traffic()
    app.add_middleware(
        Guard,
        keys=keys,
        allowed_hosts=node.config.gateway.allowed_hosts,
        traffic=traffic,
        random=node.environment.random,
    )
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    _add_health(app, node, keys)
    _add_openai(app, node)
    admin.add_routes(app, node)
    return app


def _add_health(app: FastAPI, node: Node, keys: Keys) -> None:
    @app.get("/health")
    async def health() -> Response:
        return json_response({"status": "ok"})

    @app.get("/health/ready")
    async def ready() -> Response:
        served = [view.model for view in node.pipelines()]
        if not served:
            served = [await _assemblable(node)]
        return json_response({"status": "ready", "models": served})

    @app.post("/proof")
    async def prove(request: Request, body: ProofRequest) -> Response:
        _, port = request.scope.get("server") or ("", 0)
        mac = proof(keys.admin, bytes.fromhex(body.nonce), port=port or 0)
        return json_response({"proof": mac})


def _add_openai(app: FastAPI, node: Node) -> None:
    formats = ChatFormats(node.environment)

    @app.get("/v1/models")
    async def models() -> Response:
        entries = node.catalog.list()
        return json_response(
            {"object": "list", "data": [_model_object(entry) for entry in entries]}
        )

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return json_response(_model_object(node.catalog.find(name)))

    @app.post("/v1/chat/completions")
    async def complete(body: ChatRequest) -> ReplyResponse:
        return await _chat_reply(node, formats, body)


async def _chat_reply(node: Node, formats: ChatFormats, body: ChatRequest) -> ReplyResponse:
    """Check a request and translate it; the generation begins when the response is sent.

    Only models in this machine's catalog are found, so no request loads what no admin allowed.
    """
    body.check_supported()
    random = node.environment.random
    sampling, stops, messages = body.sampling(random), body.stops(), body.conversation()
    entry = node.catalog.find(body.model or _default_model(node))
    chat_format = await formats.of(entry)
    prompt_ids = await formats.prompt_ids(chat_format, messages)
    max_tokens = _max_tokens(body, len(prompt_ids), _context(node, entry))
    plan = ReplyPlan(
        reply_id=f"chatcmpl-{random.randbytes(12).hex()}",
        created=int(node.environment.wall_time()),
        model=entry.name,
        prompt_ids=prompt_ids,
        codec=chat_format.codec,
        stops=stops,
        top_logprobs=body.top_logprobs or 0 if body.logprobs else None,
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        has_details=body.swarmpy is not None and body.swarmpy.details,
    )

    async def start(on_progress: Callable[[Progress], None]) -> Generation:
        generation: Generation = await node.generate(
            entry.model_id,
            prompt_ids,
            sampling,
            max_tokens=max_tokens,
            stop_ids=chat_format.stop_ids,
            on_progress=on_progress,
        )
        return generation

    return ReplyResponse(plan, start, stream=bool(body.stream))


def _context(node: Node, entry: ModelEntry) -> int:
    """Most tokens of a session with this model here."""
    return min(node.config.engine.context, entry.context_max or node.config.engine.context)


def _max_tokens(body: ChatRequest, prompt_tokens: int, context: int) -> int:
    """How long the reply may get: as asked for, else as long as the context goes, never longer.

    Raises:
        ContextExceeded: The prompt leaves no room for a reply.
    """
    if prompt_tokens >= context:
        raise ContextExceeded(
            f"the prompt has {prompt_tokens} tokens, the context {context}, "
            "and the reply needs room for at least one"
        )
    return min(body.max_completion_tokens or body.max_tokens or context, context - prompt_tokens)


def _default_model(node: Node) -> str:
    """The model of a request that names none: configured, else served, else the largest here.

    Raises:
        ModelNotFound: There is none.
    """
    if node.config.models.default:
        return node.config.models.default
    for view in node.pipelines():
        return view.model_id
    entries = node.catalog.list()
    if not entries:
        raise ModelNotFound("no model is on this machine")
    return max(entries, key=lambda entry: entry.size_bytes).model_id


async def _assemblable(node: Node) -> str:
    """Return the name of a model that a pipeline could be assembled for now.

    Raises:
        ModelNotFound: No model is here.
        NoPipeline: None of them fits the swarm; the message is that of the default model.
    """
    entry = node.catalog.find(_default_model(node))
    await node.check_plan(entry.name)
    return entry.name


def _model_object(entry: ModelEntry) -> dict[str, object]:
    return {
        "id": entry.name,
        "object": "model",
        "created": 0,
        "owned_by": entry.source,
        "swarmpy": {
            "model_id": entry.model_id,
            "display_name": entry.display_name,
            "size_bytes": entry.size_bytes,
            "context_max": entry.context_max,
            "license": entry.license,
        },
    }


async def _answer_http(request: Request, error: Exception) -> Response:
    """Unknown paths and methods, and bodies that FastAPI could not read."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    message = f"{request.method} {request.url.path:.80}: {error.detail}"
    refusal = Refusal(status=error.status_code, code=code, message=message)
    response = json_response(refusal.body(), status=refusal.status)
    response.headers.update(error.headers or {})
    return response


async def _answer_invalid(request: Request, error: Exception) -> Response:
    """A body that is no JSON or breaks its schema: 400, as OpenAI answers."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        refusal = Refusal(status=400, code="invalid_json", message="the body is not valid JSON")
    else:
        param = _param(first["loc"])
        message = f"{param}: {first['msg']}" if param else f"{first['msg']}"
        refusal = Refusal(status=400, code="invalid_value", message=message, param=param or None)
    return json_response(refusal.body(), status=400)


def _param(location: tuple[int | str, ...]) -> str:
    """A validation error's place as OpenAI writes it, "messages[0].role"."""
    text = ""
    for part in location[1:]:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
