"""`POST /generate` and `/generate_stream`, and `POST /` for clients that post to the server's URL itself."""

import math
import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request
from fastapi.responses import JSONResponse, Response

from app.api.auth.authenticator import needs
from app.api.auth.principal import Caller, Calling
from app.api.disconnect import unless_client_leaves
from app.api.middleware.load_shedding import GatedRoute
from app.api.middleware.timing import timing_of
from app.api.schemas.answers import ErrorEnvelope
from app.api.schemas.generate import (
    GenerateRequest,
    GenerateResponse,
    GenerateStreamRequest,
    Parameters,
    StreamEvent,
)
from app.api.sse import EventStreamResponse, data_event, described_events, json_bytes
from app.api.state import Services, services
from app.keys.key import Scope
from app.serving.generation_request import (
    Classification,
    GenerationRequest,
    GenerationResult,
    OutputToken,
    TextDelta,
)

router = APIRouter(tags=["generate"], route_class=GatedRoute)

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
    calling: Calling,
    deadline_ms: Deadline = None,
) -> Any:
    """Generate with a task, or with the base model where no task is given."""
    wanted = _request(body, request, behind, calling, deadline_ms)
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
    calling: Calling,
    deadline_ms: Deadline = None,
) -> Any:
    """Do the same as /generate for clients of TGI, which expect a list here; a stream stays a stream."""
    wanted = _request(body, request, behind, calling, deadline_ms)
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
    calling: Calling,
    deadline_ms: Deadline = None,
) -> Any:
    """Do the same as /generate with "stream": true. An error before the first token has its own status."""
    return await _stream(request, behind, _request(body, request, behind, calling, deadline_ms))


async def _whole(
    body: GenerateRequest, request: Request, behind: Services, wanted: GenerationRequest
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return an answer that is no stream, and its timing headers."""
    begin = time.monotonic()
    results = await unless_client_leaves(request, behind.generation.generate_all([wanted]))
    with_details = body.parameters is None or body.parameters.details is not False
    answer = _answer(results[0], with_details)
    if len(results) > 1:
        answer["samples"] = [_sample(result, with_details) for result in results]
    return answer, timing_of(results, time.monotonic() - begin)


def _sample(result: GenerationResult, with_details: bool) -> dict[str, Any]:
    sample: dict[str, Any] = {"generated_text": result.generated_text}
    return sample | {"details": _details(result)} if with_details else sample


async def _stream(request: Request, behind: Services, wanted: GenerationRequest) -> EventStreamResponse:
    stream = await unless_client_leaves(request, behind.generation.start([wanted]))
    return EventStreamResponse(stream, TokenEvents())


def _request(
    body: GenerateRequest, request: Request, behind: Services, calling: Caller, deadline_ms: int | None
) -> GenerationRequest:
    begin = time.monotonic()
    calling.require(body.reference or behind.generation.base_name)
    given = body.parameters or Parameters()
    return GenerationRequest(
        inputs=body.inputs,
        num_samples=body.num_answers,
        classification=given.classification(),
        request_id=request.state.request_id,
        task=body.reference,
        user=body.user,
        parameters=given.given(),
        constraint=given.constraint(),
        deadline=None if deadline_ms is None else begin + deadline_ms / 1000,
        tenant=calling.tenant,
    )


class TokenEvents:
    """Writes pieces as TGI does: an event for each token, which holds what may be shown of its text."""

    def __init__(self) -> None:
        self._index = 0

    def __call__(self, item: tuple[int, TextDelta]) -> bytes:
        """The event of one piece."""
        _, piece = item
        token, result = piece.token, piece.result
        if token is None:
            return b""
        self._index += 1
        written = json_bytes(
            {
                "index": self._index,
                "token": _token(token) | {"text": piece.text},
                **({"top_tokens": [_token(other) for other in token.top]} if token.top else {}),
                "generated_text": None if result is None else result.generated_text,
                "details": None if result is None else _details_of_stream(result),
            }
        )
        return data_event(written)


def _details_of_stream(result: GenerationResult) -> dict[str, Any]:
    version = result.version
    return {
        "finish_reason": str(result.finish),
        "generated_tokens": len(result.tokens),
        "input_length": result.prompt_tokens,  # TGI's name
        "prompt_tokens": result.prompt_tokens,  # LoRAX's
        "virtual_tokens": result.virtual_tokens,
        "seed": result.seed,
        "task_version": None if version is None else version.version,
        "version_digest": None if version is None else f"sha256:{version.digest}",
    }


def _answer(result: GenerationResult, with_details: bool) -> dict[str, Any]:
    version = result.version
    answer: dict[str, Any] = {
        "generated_text": result.generated_text,
        "task_id": None if version is None else version.task_id,
        "task_version": None if version is None else version.version,
        "version_digest": None if version is None else f"sha256:{version.digest}",
    }
    if with_details:
        answer["details"] = _details(result)
    if result.classification is not None:
        answer["choice"] = _choice(result.text, result.classification)
    return answer


def _choice(best: str, classification: Classification) -> dict[str, Any]:
    return {
        "value": best,
        "confidence": classification.confidence,
        "probabilities": [
            {"value": value, "probability": probability}
            for value, probability in classification.probabilities
        ],
    }


def _details(result: GenerationResult) -> dict[str, Any]:
    details: dict[str, Any] = {
        "finish_reason": str(result.finish),
        "generated_tokens": len(result.tokens),
        "prompt_tokens": result.prompt_tokens,
        "virtual_tokens": result.virtual_tokens,
        "seed": result.seed,
        "prefill": [
            {
                "id": token.id,
                "text": token.text,
                "logprob": None if math.isnan(token.logprob) else _finite(token.logprob),
            }
            for token in result.prompt_scores
        ],
        "tokens": [_token(token) for token in result.tokens],
    }
    if any(token.top for token in result.tokens):
        details["top_tokens"] = [[_token(other) for other in token.top] for token in result.tokens]
    return details


def _token(token: OutputToken) -> dict[str, Any]:
    return {
        "id": token.id,
        "text": token.text,
        "logprob": _finite(token.logprob),
        "special": token.special,
    }


def _finite(logprob: float) -> float:
    """JSON has no infinity: a token that the model itself gave no chance."""
    return logprob if math.isfinite(logprob) else -1e30
