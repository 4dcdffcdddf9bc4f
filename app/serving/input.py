"""The input handling deployment, the application's ingress: validation, and OpenAI's HTTP interface.

    POST /v1/chat/completions   POST /v1/completions   POST /v1/embeddings   POST /tokenize   POST /detokenize
    GET /v1/models   GET /v1/models/{id}   POST /v1/feedback   GET /v1/why/{response_id}   GET /openapi.json
    GET /v1/handovers   POST /v1/handovers/{response_id}/take
    GET /health (this replica lives)   GET /ready (every variant's model is loaded)   GET / (the chat page)

An answer's way: this deployment checks the question, a language model writes the reply while small functions look at
the question, and response management settles and logs it; only then does the client read the end of it.
"""

import asyncio
import contextlib
import contextvars
import time
from collections.abc import Mapping
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from app.errors import RequestError
from app.serving import limits
from app.serving.access import Access, scope_of
from app.serving.answer import Answer
from app.serving.answering import Answering
from app.serving.bodies import ChatCompletionBody
from app.serving.conversations import Turn
from app.serving.functions import Functions
from app.serving.gate import Gate, error_response
from app.serving.guard import Guard
from app.serving.limits import Limiter
from app.serving.models import Models, version_gone
from app.serving.openai_format import embeddings
from app.serving.openapi import document
from app.serving.requests import (
    chat_request,
    parse_chat,
    parse_completion,
    parse_detokenize,
    parse_embedding,
    parse_feedback,
    parse_take,
    parse_tokenize,
)
from app.serving.schema import AnswerRequest, Refused
from app.settings.serving import ServingConfig, VariantConfig
from app.storage import Storage
from app.telemetry import set_up_logging
from app.traffic import new_response_id, now

CALL_TIMEOUT_S = 60.0
"""How long a client waits for another deployment, say while a killed replica is replaced, before it reads 503."""
READY_TIMEOUT_S, READY_KEPT_S = 3.0, 0.25
"""How long /ready waits for a model, and for how long all who ask are told the same: it wants no key, and each look
takes a place in the models' queues."""
MAX_HANDOVERS = 100
"""Told at once."""
MODELS_POLL_S = 0.2

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGE = {
    "/": ("index.html", "text/html"),
    "/page/page.css": ("page.css", "text/css"),
    "/page/page.js": ("page.js", "text/javascript"),
}


@serve.ingress()
class InputHandling:
    """Speaks HTTP for the application."""

    def __init__(
        self,
        config: ServingConfig,
        language_models: Mapping[str, "DeploymentHandle[Any]"],
        functions: Mapping[str, "DeploymentHandle[Any]"],
        response: "DeploymentHandle[Any]",
        ledger: "DeploymentHandle[Any]",
    ) -> None:
        set_up_logging(deployment="input")
        self._start = self._config = config
        self._access = Access(Storage(config.storage_uri))
        self._limiter = Limiter(config, ledger)
        self._models = Models(config.variants)
        self._language_models, self._response = language_models, response
        self._functions = Functions(functions, config.functions.deadline_s)
        self._answering = Answering(response, self._functions, config.fallback_after_s)
        self._guard = Guard(config)
        self._looking: asyncio.Task[tuple[dict[str, Any], ...] | None] | None = None
        self._look_again_s = 0.0
        page = resources.files("app.serving") / "page"
        self._page = {path: (page / name).read_bytes() for path, (name, _) in PAGE.items()}

    def reconfigure(self, live: dict[str, Any]) -> None:
        """Called by Serve at the start, and when settings change that need no new replica."""
        self._config = self._start.with_live(live)
        self._models.take(self._config.variants)
        self._limiter.take(self._config)
        self._guard = Guard(self._config)

    async def __serve_build_asgi_app__(self) -> Gate:
        """Called by Serve once the replica is made. While its models' versions are not there, an older one answers."""
        await self._models_come()
        return self._gate()

    def _gate(self) -> Gate:
        routes = FastAPI(
            openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=self._access.followed
        )
        for path in PAGE:
            routes.add_api_route(path, self.page, methods=["GET"], response_model=None)
        routes.add_api_route("/health", self.health, methods=["GET"], response_model=None)
        routes.add_api_route("/ready", self.ready, methods=["GET"], response_model=None)
        routes.add_api_route("/v1/models", self.models, methods=["GET"], response_model=None)
        routes.add_api_route("/v1/models/{name:path}", self.model, methods=["GET"], response_model=None)
        routes.add_api_route("/v1/chat/completions", self.chat, methods=["POST"], response_model=None)
        routes.add_api_route("/v1/completions", self.complete, methods=["POST"], response_model=None)
        routes.add_api_route("/v1/embeddings", self.embed, methods=["POST"], response_model=None)
        routes.add_api_route("/tokenize", self.tokenize, methods=["POST"], response_model=None)
        routes.add_api_route("/detokenize", self.detokenize, methods=["POST"], response_model=None)
        routes.add_api_route("/openapi.json", self.openapi, methods=["GET"], response_model=None)
        routes.add_api_route("/v1/feedback", self.feedback, methods=["POST"], response_model=None)
        routes.add_api_route("/v1/handovers", self.handovers, methods=["GET"], response_model=None)
        routes.add_api_route("/v1/handovers/{response_id}/take", self.take, methods=["POST"], response_model=None)
        routes.add_api_route("/v1/why/{response_id}", self.why, methods=["GET"], response_model=None)
        routes.add_exception_handler(RequestError, _refuse)
        routes.add_exception_handler(HTTPException, _refuse_http)
        for unavailable in (RayError, RayServeException, TimeoutError):
            routes.add_exception_handler(unavailable, _unavailable)
        return Gate(routes, self._access, self._limiter, self._config)

    async def _models_come(self) -> None:
        """Wait until the models that this replica names are loaded, but not for ever: an old one may be ill too."""
        awaited = {variant.name: variant for variant in self._config.variants if self._config.size(variant).least > 0}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.deploy_timeout_s):
                while awaited:
                    for name, variant in list(awaited.items()):
                        with contextlib.suppress(RayError, RayServeException):
                            model = await self._language_models[name].ready.remote()
                            if model.versions.get(name) == f"{variant.model}/{variant.version}":
                                del awaited[name]
                    await asyncio.sleep(MODELS_POLL_S if awaited else 0)

    async def page(self, request: Request) -> Response:
        """The chat page and its parts."""
        headers = {"Content-Security-Policy": CONTENT_SECURITY_POLICY}
        path = request.url.path
        return Response(self._page[path], media_type=PAGE[path][1], headers=headers)

    async def health(self) -> Response:
        """200 while this replica lives."""
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        """200 once a replica of every variant says that its model is loaded, 503 before."""
        if self._looking is None or (self._looking.done() and time.monotonic() > self._look_again_s):
            # An empty context: Serve cancels the calls that a cancelled request made, which it knows by the context.
            self._looking = asyncio.get_running_loop().create_task(self._look(), context=contextvars.Context())
        if (found := await asyncio.shield(self._looking)) is None:
            return error_response(503, "a language model is still loading", "not_ready")
        versions, slots = found
        return JSONResponse({"status": "ready", "variants": versions, "slots_in_use": slots})

    async def _look(self) -> tuple[dict[str, Any], ...] | None:
        """Version by variant, and slots in use by model; none while one of them is not there."""
        # One that may scale to zero would be woken by the question.
        models = [variant for variant in self._config.variants if variant.adapter_of is None]
        kept = [model for model in models if self._config.size(model).least > 0]
        try:
            ready = await asyncio.gather(*map(self._readiness, kept))
        except (TimeoutError, RayError, RayServeException):
            return None
        finally:
            self._look_again_s = time.monotonic() + READY_KEPT_S
        variants = {name: version for versions, _ in ready for name, version in versions.items()}
        return variants, {next(iter(versions)): slots for versions, slots in ready}

    async def _readiness(self, variant: VariantConfig) -> tuple[dict[str, str], int]:
        """What a model writes for, itself first, as `Readiness.versions`; and its slots in use.

        Raises:
            TimeoutError, RayError, RayServeException: No replica of it is there.
        """
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                model = await self._language_models[variant.name].ready.remote()
        except (TimeoutError, BackPressureError):
            # So many questions wait that this one does not get through; a model that writes is ready, and busy.
            if time.monotonic() - self._answering.heard_s.get(variant.deployment, float("-inf")) > READY_TIMEOUT_S:
                raise
            known = (variant, *self._config.adapters(variant))
            return {each.name: f"{each.model}/{each.version}" for each in known}, self._config.max_batch_slots
        return model.versions, model.slots_in_use

    async def models(self) -> Response:
        """Every name the `model` field takes."""
        return JSONResponse({"object": "list", "data": self._models.cards()})

    async def model(self, name: str) -> Response:
        """One of them."""
        return JSONResponse(self._models.card(name))

    async def chat(self, request: Request) -> Response:
        """An answer, whole or streamed."""
        begun_s, received_at = time.monotonic(), now()
        chat = parse_chat(await self._body(request), self._config)
        turn, said = await self._conversation(request, chat)
        # Schemas take time to be read: other requests do not wait for it.
        if chat.tools or chat.response_format:
            asked = await asyncio.to_thread(chat_request, chat, self._config, said)
        else:
            asked = chat_request(chat, self._config, said)
        return await self._answer(request, asked, new_response_id(), begun_s, received_at, turn)

    async def complete(self, request: Request) -> Response:
        """A text gone on with, whole or streamed."""
        begun_s, received_at = time.monotonic(), now()
        if self._config.system_prompt or self._config.rules:
            what = "plain completions are off here: they know neither the system text nor the rules"
            raise RequestError(403, what, "completions_off")
        asked = parse_completion(await self._body(request), self._config)
        return await self._answer(request, asked, new_response_id("cmpl"), begun_s, received_at)

    async def _conversation(
        self, request: Request, chat: ChatCompletionBody
    ) -> tuple[Turn | None, list[dict[str, Any]]]:
        """What the request adds to a conversation that is remembered, and what was said in it before."""
        if chat.conversation_id is None:
            return None, []
        owner = request.state.key.name
        async with asyncio.timeout(CALL_TIMEOUT_S):
            said = await self._response.conversation.remote(owner, chat.conversation_id)
        _raise_refused(said)
        new = tuple(message.model_dump(exclude_none=True) for message in chat.messages)
        return Turn(owner, chat.conversation_id, said.turns, new), said.messages

    async def _answer(
        self,
        request: Request,
        asked: AnswerRequest,
        response_id: str,
        begun_s: float,
        received_at: str,
        turn: Turn | None = None,
    ) -> Response:
        if self._config.privacy.mask_model:
            asked = await asyncio.to_thread(self._guard.masked, asked)
        is_chat = asked.endpoint == "chat"
        user_hash = self._access.pseudonym(asked.user) if asked.user else None
        who = f"{turn.owner} {turn.conversation_id}" if turn else response_id
        variant = self._models.resolve(asked.model, user_hash or who)
        insight = self._functions.ask(asked.question, variant.name) if is_chat and self._guard.needs_intent else None
        intent = (await insight).intent if insight else None
        request.state.response_id = response_id
        answer = Answer(
            response_id=response_id,
            received_at=received_at,
            begun_s=begun_s,
            request=asked,
            variant=variant,
            insight=insight,
            user_hash=user_hash,
            scope=request.state.key.name,
            rule=self._guard.rule(asked.question, intent) if is_chat else None,
            turn=turn,
        )
        is_pinned = asked.model == f"{variant.model}/{variant.version}"
        chain = [variant] if is_pinned else self._models.chain(variant)
        return await self._answering.answer(answer, [(each, self._language_models[each.name]) for each in chain])

    async def embed(self, request: Request) -> Response:
        """Texts as vectors."""
        asked, body = parse_embedding(await self._body(request), self._config)
        # Vectors are compared with one another, so all of a name's come from one variant.
        variant = self._models.resolve(asked.model, asked.model)
        async with asyncio.timeout(CALL_TIMEOUT_S):
            model = self._language_models[variant.name]
            # While versions change it may be one of before adapters, which takes no name of one.
            named = (variant.adapter,) if variant.adapter else ()
            embedded = await model.embed.remote(asked.prompts, *named)
        _raise_refused(embedded)
        # While versions change, not always the one that is known here.
        found = embedded.variant or variant
        version = f"{found.model}/{found.version}"
        if asked.model == f"{variant.model}/{variant.version}" != version:
            raise version_gone(asked.model)
        limits.spend(embedded.prompt_tokens)
        size = len(embedded.vectors[0])
        if body.dimensions not in (None, size):
            what = f"dimensions={body.dimensions} is not supported: this model's vectors have {size}"
            raise RequestError(400, what, "unsupported_value", "dimensions")
        return JSONResponse(embeddings(embedded, version, is_base64=body.encoding_format == "base64"))

    async def tokenize(self, request: Request) -> Response:
        """A text's or conversation's tokens."""
        asked = parse_tokenize(await self._body(request), self._config)
        variant = self._models.resolve(asked.model, new_response_id())
        async with asyncio.timeout(CALL_TIMEOUT_S):
            tokens = await self._language_models[variant.name].tokenize.remote(asked.prompts[0], asked.tools)
        _raise_refused(tokens)
        return JSONResponse(
            {
                "count": len(tokens.ids),
                "max_model_len": tokens.context_tokens,
                "tokens": tokens.ids,
                "token_strs": tokens.texts,
            }
        )

    async def detokenize(self, request: Request) -> Response:
        """The text of tokens."""
        asked = parse_detokenize(await self._body(request))
        variant = self._models.resolve(asked.model, new_response_id())
        async with asyncio.timeout(CALL_TIMEOUT_S):
            text = await self._language_models[variant.name].detokenize.remote(asked.prompts[0])
        _raise_refused(text)
        return JSONResponse({"prompt": text})

    async def openapi(self) -> Response:
        """What this service takes and gives."""
        return JSONResponse(document(self._models.names))

    async def feedback(self, request: Request) -> Response:
        """Take a judgement of an answer; acknowledged when it is on disk."""
        given = parse_feedback(await self._body(request))
        async with asyncio.timeout(CALL_TIMEOUT_S):
            logged = await self._response.feedback.remote(given)
        _raise_refused(logged)
        return JSONResponse(
            {"object": "feedback", "response_id": logged.response_id, "received_at": logged.received_at}
        )

    async def handovers(self, request: Request) -> Response:
        """Answers that wait for a person, oldest first."""
        given = request.query_params.get("limit", "20")
        if not (given.isdecimal() and 1 <= int(given[:4]) <= MAX_HANDOVERS):
            raise RequestError(400, f"limit must be 1 to {MAX_HANDOVERS}, got {given[:20]!r}", "invalid_value", "limit")
        async with asyncio.timeout(CALL_TIMEOUT_S):
            waiting = await self._response.waiting.remote(int(given))
        _raise_refused(waiting)
        return JSONResponse({"object": "list", "data": waiting})

    async def take(self, request: Request, response_id: str) -> Response:
        """Take an answer over; of two people only one gets it."""
        agent = parse_take(await self._body(request))
        async with asyncio.timeout(CALL_TIMEOUT_S):
            taken = await self._response.take.remote(response_id, agent)
        _raise_refused(taken)
        return JSONResponse(taken)

    async def why(self, response_id: str) -> Response:
        """The chain behind an answer."""
        async with asyncio.timeout(CALL_TIMEOUT_S):
            chain = await self._response.why.remote(response_id)
        _raise_refused(chain)
        return JSONResponse(chain)

    async def _body(self, request: Request) -> bytes:
        try:
            return await request.body()
        except ClientDisconnect:
            raise RequestError(400, "the connection closed before the body was complete", "incomplete_body") from None


def _raise_refused(result: Any) -> None:
    if isinstance(result, Refused):
        raise RequestError(result.status, result.what, result.code, result.param)


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error_response(error.status, str(error), error.code, error.param)


async def _refuse_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path, method = request.url.path, request.method
    if error.status_code == 405:
        response = error_response(405, f"{path} does not take {method}", "method_not_allowed")
        response.headers.update(error.headers or {})
        return response
    what = f"there is no {path} here" if error.status_code == 404 else str(error.detail)
    if error.status_code == 404 and scope_of(f"/v1{path}") != "admin":  # a route that is listed
        what += f"; did you mean /v1{path}?"
    return error_response(error.status_code, what, "not_found" if error.status_code == 404 else None)


async def _unavailable(request: Request, error: Exception) -> Response:
    if isinstance(error, BackPressureError):
        return error_response(429, "too many requests are waiting; try again shortly", "overloaded")
    return error_response(503, "a part of the service is being restarted; try again shortly", "service_unavailable")
