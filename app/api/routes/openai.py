"""`/v1/completions`, `/v1/chat/completions`, `/v1/models`: tasks as models, for clients of OpenAI's."""

import asyncio
import secrets
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from app.api.auth.authenticator import needs
from app.api.auth.principal import CurrentPrincipal
from app.api.disconnect import unless_client_leaves
from app.api.middleware.timing import timing_of
from app.api.queries import KNOWN_QUERIES
from app.api.routes.generate import ERRORS, Deadline
from app.api.routes.openai_answers import (
    ChatChunks,
    CompletionChunks,
    Head,
    chat_completion,
    completion,
)
from app.api.routes.openai_errors import OpenAiRoute
from app.api.routes.openai_requests import generation_requests
from app.api.schemas.openai import ChatRequest, CompletionRequest
from app.api.schemas.openai_answers import ChatCompletion, Completion, ModelCard, ModelList
from app.api.sse import EventStreamResponse, described_events, json_bytes
from app.api.state import Services, services
from app.errors import InvalidRequest
from app.keys.key import Scope
from app.prompt import TaskVersion
from app.sites import Embedding, Site

router = APIRouter(prefix="/v1", tags=["openai"], route_class=OpenAiRoute, dependencies=KNOWN_QUERIES)

Behind = Annotated[Services, Depends(services)]
_ANSWERS: dict[int | str, dict[str, Any]] = ERRORS | {
    200: {"content": {"text/event-stream": described_events()}}  # OpenAI's chunks, then [DONE]
}


@router.post("/completions", response_model=Completion, responses=_ANSWERS, summary="Complete prompts")
@needs(Scope.GENERATE)
async def completions(
    body: CompletionRequest,
    request: Request,
    behind: Behind,
    principal: CurrentPrincipal,
    deadline_ms: Deadline = None,
) -> Response:
    """Complete each prompt `n` times; prompts that are text are rendered by the task's template."""
    begin = time.monotonic()
    principal.require(body.model)
    if body.scores_prompt and behind.engine.geometry.has_encoder:
        raise InvalidRequest(
            "An encoder reads this base's prompts, so that they have no log-probabilities; leave out echo or "
            "logprobs. parameters.choices of /generate score answers.",
            param="echo",
        )
    prompts = body.prompts
    inputs = [{"inputs": prompt} if isinstance(prompt, str) else {"token_ids": prompt} for prompt in prompts]
    wanted = generation_requests(body, inputs, request, principal, deadline_ms)
    logprobs, echo = body.logprobs is not None, bool(body.echo)
    if body.stream:
        started = await unless_client_leaves(request, behind.generation.start(wanted))
        admitted = started.admitted
        chunks = CompletionChunks(
            _head("cmpl", body, behind, admitted[0].versions),
            prompts=[each.prompt_text if echo else None for each in admitted],
            prompt_tokens=[len(each.prompt_ids) for each in admitted],
            num_prompts=len(prompts),
            logprobs=logprobs,
            usage=body.wants_usage,
            usage_so_far=body.wants_usage_so_far,
        )
        return EventStreamResponse(started, chunks, end=chunks.end)
    results = await unless_client_leaves(request, behind.generation.generate_all(wanted))
    head = _head("cmpl", body, behind, results[0].versions)
    return JSONResponse(
        completion(head, results, len(prompts), logprobs=logprobs, echo=echo),
        headers=timing_of(results, time.monotonic() - begin, len(prompts)),
    )


@router.post("/chat/completions", response_model=ChatCompletion, responses=_ANSWERS, summary="Answer a chat")
@needs(Scope.GENERATE)
async def chat_completions(
    body: ChatRequest,
    request: Request,
    behind: Behind,
    principal: CurrentPrincipal,
    deadline_ms: Deadline = None,
) -> Response:
    """Answer a chat.

    A task's template renders the last user message; without one, the base's chat template renders all.
    """
    begin = time.monotonic()
    principal.require(body.model)
    messages = tuple(message.message() for message in body.messages)
    wanted = generation_requests(body, [{"messages": messages}], request, principal, deadline_ms)
    logprobs = bool(body.logprobs)
    if body.stream:
        started = await unless_client_leaves(request, behind.generation.start(wanted))
        admitted = started.admitted
        chunks = ChatChunks(
            _head("chatcmpl", body, behind, admitted[0].versions),
            prompt_tokens=[len(each.prompt_ids) for each in admitted],
            num_prompts=1,
            logprobs=logprobs,
            usage=body.wants_usage,
            usage_so_far=body.wants_usage_so_far,
        )
        return EventStreamResponse(started, chunks, end=chunks.end)
    results = await unless_client_leaves(request, behind.generation.generate_all(wanted))
    head = _head("chatcmpl", body, behind, results[0].versions)
    return JSONResponse(
        chat_completion(head, results, logprobs=logprobs),
        headers=timing_of(results, time.monotonic() - begin),
    )


@router.get(
    "/models",
    response_model=ModelList,
    responses=ERRORS,
    summary="List models",
)
@needs(Scope.GENERATE, Scope.UPLOAD, Scope.ADMIN)
async def list_models(behind: Behind, principal: CurrentPrincipal) -> Response:
    """Return the base model, then all tasks that can be served, in order of their ids."""
    base = behind.generation.base_name
    tasks = await asyncio.to_thread(
        behind.catalog.servable,
        principal.may_use,
        lambda version: json_bytes(_card(behind, version.task_id, version)),
    )
    bases = [json_bytes(_card(behind, base, None))] if principal.may_use(base) else []
    body = b",".join([*bases, *tasks])
    return Response(b'{"object":"list","data":[%b]}' % body, media_type="application/json")


@router.get("/models/{model:path}", response_model=ModelCard, responses=ERRORS, summary="Get a model")
@needs(Scope.GENERATE, Scope.UPLOAD, Scope.ADMIN)
async def show_model(model: str, behind: Behind, principal: CurrentPrincipal) -> JSONResponse:
    """Return the base model or a task: task, task@alias, task@3 or task@sha256:<digest>."""
    principal.require(model)
    if model == behind.generation.base_name:
        return JSONResponse(_card(behind, model, None))
    version = await asyncio.to_thread(behind.store.resolve, model)
    return JSONResponse(_card(behind, model, version))


def _head(
    prefix: str, body: CompletionRequest | ChatRequest, behind: Services, versions: Sequence[TaskVersion]
) -> Head:
    fingerprint = behind.engine.geometry.fingerprint
    return Head(f"{prefix}-{secrets.token_hex(12)}", body.model, fingerprint, versions)


def _card(behind: Services, name: str, version: TaskVersion | None) -> ModelCard:
    base = behind.generation.base_name
    published = None if version is None else version.provenance.get("published_at")
    created = 0 if published is None else int(datetime.fromisoformat(published).timestamp())
    geometry = behind.engine.geometry
    places: tuple[Embedding | Site, ...] = (Embedding.DECODER, Site.DECODER_SELF, Embedding.ENCODER)
    soft, prefix, source = (0, 0, 0) if version is None else map(version.length, places)
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "promptplex",
        "root": base,
        "parent": None if version is None else base,
        "max_model_len": geometry.max_positions - soft - prefix,
        "max_source_len": geometry.max_source_positions - source if geometry.has_encoder else None,
    }
