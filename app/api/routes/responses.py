"""`/v1/responses`, stateless: what a client wants to go on with, it sends back."""

import secrets
import time
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from app.api.auth.authenticator import needs
from app.api.auth.principal import CurrentPrincipal
from app.api.disconnect import unless_client_leaves
from app.api.middleware.timing import timing_of
from app.api.queries import KNOWN_QUERIES
from app.api.routes.generate import ERRORS, Deadline
from app.api.routes.openai_answers import Head
from app.api.routes.openai_errors import OpenAiRoute
from app.api.routes.openai_requests import generation_requests
from app.api.routes.responses_answers import ResponseParts
from app.api.routes.responses_events import ResponseEvents
from app.api.schemas.responses import ResponseRequest
from app.api.schemas.responses_answers import ModelResponse
from app.api.sse import EventStreamResponse, described_events
from app.api.state import Services, services
from app.keys.key import Scope
from app.prompt import TaskVersion

router = APIRouter(prefix="/v1", tags=["openai"], route_class=OpenAiRoute, dependencies=KNOWN_QUERIES)

_ANSWERS: dict[int | str, dict[str, Any]] = ERRORS | {
    200: {"content": {"text/event-stream": described_events()}}  # OpenAI's events
}


@router.post("/responses", response_model=ModelResponse, responses=_ANSWERS, summary="Create a response")
@needs(Scope.GENERATE)
async def create_response(
    body: ResponseRequest,
    request: Request,
    behind: Annotated[Services, Depends(services)],
    principal: CurrentPrincipal,
    deadline_ms: Deadline = None,
) -> Response:
    """Answer a conversation, which is not kept.

    A task's template renders the last user message; without one, the base's chat template renders all.
    """
    begin = time.monotonic()
    principal.require(body.model)
    wanted = generation_requests(body, [{"messages": body.messages()}], request, principal, deadline_ms)
    if body.stream:
        started = await unless_client_leaves(request, behind.generation.start(wanted))
        events = ResponseEvents(_parts(body, behind, started.admitted[0].versions))
        return EventStreamResponse(started, events, fail=events.fail)
    results = await unless_client_leaves(request, behind.generation.generate_all(wanted))
    return JSONResponse(
        _parts(body, behind, results[0].versions).ended(results[0]),
        headers=timing_of(results, time.monotonic() - begin),
    )


def _parts(body: ResponseRequest, behind: Services, versions: Sequence[TaskVersion]) -> ResponseParts:
    head = Head(secrets.token_hex(12), body.model, behind.engine.geometry.fingerprint, versions)
    return ResponseParts(head, body)
