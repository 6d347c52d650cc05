"""`POST /generate` and `/generate_stream`, and `POST /` for clients that post to the server's URL itself."""

import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request
from fastapi.responses import JSONResponse, Response

from app.api.auth.authenticator import needs
from app.api.auth.principal import CurrentPrincipal, Principal
from app.api.disconnect import unless_client_leaves
from app.api.middleware.load_shedding import GatedRoute
from app.api.middleware.timing import timing_of
from app.api.queries import KNOWN_QUERIES
from app.api.routes.generate_answers import TokenEvents, generate_answer
from app.api.schemas.answers import ErrorEnvelope, GenerateResponse, StreamEvent
from app.api.schemas.generate import (
    GenerateRequest,
    GenerateStreamRequest,
    Parameters,
)
from app.api.sse import EventStreamResponse, described_events
from app.api.state import Services, services
from app.keys.key import Scope
from app.serving.generation_request import GenerationRequest

router = APIRouter(tags=["generate"], route_class=GatedRoute, dependencies=KNOWN_QUERIES)

MAX_DEADLINE_MS = 86_400_000
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorEnvelope} for status in (400, 403, 404, 408, 413, 422, 500, 503, 504)
}

Deadline = Annotated[
    int | None,
    Header(
        alias="X-Request-Deadline-Ms",
        ge=1,
        le=MAX_DEADLINE_MS,
        description="Milliseconds until the request is given up with 504",
    ),
]


_ANSWERS: dict[int | str, dict[str, Any]] = ERRORS | {
    200: {"content": {"text/event-stream": described_events(StreamEvent, ErrorEnvelope)}}
}


@router.post("/generate", response_model=GenerateResponse, responses=_ANSWERS, summary="Generate text")
@needs(Scope.GENERATE)
async def generate(
    body: GenerateRequest,
    request: Request,
    behind: Annotated[Services, Depends(services)],
    principal: CurrentPrincipal,
    deadline_ms: Deadline = None,
) -> Response:
    """Generate with a task, or with the base model where no task is given."""
    wanted = _request(body, request, behind, principal, deadline_ms)
    if body.is_stream:
        return await _stream(request, behind, wanted)
    answer, timing = await _whole(body, request, behind, wanted)
    return JSONResponse(answer, headers=timing)


@router.post(
    "/",
    response_model=list[GenerateResponse],
    responses=_ANSWERS,
    summary="Generate text (list of one answer)",
)
@needs(Scope.GENERATE)
async def generate_at_root(
    body: GenerateRequest,
    request: Request,
    behind: Annotated[Services, Depends(services)],
    principal: CurrentPrincipal,
    deadline_ms: Deadline = None,
) -> Response:
    """Do the same as /generate for clients of TGI, which expect a list here; a stream stays a stream."""
    wanted = _request(body, request, behind, principal, deadline_ms)
    if body.is_stream:
        return await _stream(request, behind, wanted)
    answer, timing = await _whole(body, request, behind, wanted)
    return JSONResponse([answer], headers=timing)


@router.post(
    "/generate_stream",
    response_class=Response,
    responses=_ANSWERS,
    summary="Generate text as a stream",
)
@needs(Scope.GENERATE)
async def generate_stream(
    body: GenerateStreamRequest,
    request: Request,
    behind: Annotated[Services, Depends(services)],
    principal: CurrentPrincipal,
    deadline_ms: Deadline = None,
) -> Response:
    """Do the same as /generate with "stream": true. An error before the first token has its own status."""
    return await _stream(request, behind, _request(body, request, behind, principal, deadline_ms))


async def _whole(
    body: GenerateRequest, request: Request, behind: Services, wanted: GenerationRequest
) -> tuple[GenerateResponse, dict[str, str]]:
    """Return an answer that is no stream, and its timing headers."""
    begin = time.monotonic()
    results = await unless_client_leaves(request, behind.generation.generate_all([wanted]))
    with_details = body.parameters is None or body.parameters.details is not False
    return generate_answer(results, with_details=with_details), timing_of(results, time.monotonic() - begin)


async def _stream(request: Request, behind: Services, wanted: GenerationRequest) -> EventStreamResponse:
    stream = await unless_client_leaves(request, behind.generation.start([wanted]))
    shows_reasoning = stream.admitted[0].parameters.include_reasoning
    return EventStreamResponse(stream, TokenEvents(shows_reasoning=shows_reasoning))


def _request(
    body: GenerateRequest, request: Request, behind: Services, principal: Principal, deadline_ms: int | None
) -> GenerationRequest:
    begin = time.monotonic()
    principal.require(body.reference or behind.generation.base_name)
    given = body.parameters or Parameters()
    return GenerationRequest(
        inputs=body.inputs,
        num_samples=body.num_answers,
        classification=given.classification(),
        vote=None if given.vote is None else given.vote.request(),
        request_id=request.state.request_id,
        task=body.reference,
        user=body.user,
        parameters=given.given(),
        constraint=given.constraint(),
        deadline=None if deadline_ms is None else begin + deadline_ms / 1000,
        tenant=principal.tenant,
        require=principal.require,
    )
