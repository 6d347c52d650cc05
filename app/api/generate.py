"""`POST /generate`, and `POST /` for clients that post to the server's URL itself."""

import asyncio
import contextlib
import math
import time
from collections.abc import Coroutine
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Header, Request
from fastapi.responses import JSONResponse

from app.api.schemas import ErrorEnvelope, GenerateRequest, GenerateResponse
from app.api.state import Services, services
from app.errors import Cancelled
from app.serving.answers import GenerationAsk, GenerationResult
from app.serving.parameters import GenerationParameters

router = APIRouter(tags=["generate"])
_T = TypeVar("_T")

MAX_DEADLINE_MS = 86_400_000
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorEnvelope} for status in (400, 403, 404, 413, 422, 500, 503, 504)
}

Deadline = Annotated[
    int | None,
    Header(
        alias="X-Request-Deadline-Ms", ge=1, le=MAX_DEADLINE_MS, description="Give up (504) after so long"
    ),
]


@router.post("/generate", response_model=GenerateResponse, responses=ERRORS, summary="Generate text")
@router.post("/", response_model=GenerateResponse, responses=ERRORS, summary="The same as /generate")
async def generate(
    body: GenerateRequest,
    request: Request,
    behind: Annotated[Services, Depends(services)],
    deadline_ms: Deadline = None,
) -> JSONResponse:
    """Generate with a task's prompt, or with the base model where no task is named."""
    begin = time.monotonic()
    ask = GenerationAsk(
        inputs=body.inputs,
        request_id=request.state.request_id,
        task=body.reference,
        user=body.user,
        parameters=body.parameters.generation() if body.parameters else GenerationParameters(),
        deadline=None if deadline_ms is None else begin + deadline_ms / 1000,
    )
    result = await unless_client_leaves(request, behind.generation.generate(ask))
    with_details = body.parameters is None or body.parameters.details
    return JSONResponse(_answer(result, with_details), headers=_timing(result, time.monotonic() - begin))


async def unless_client_leaves(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """Await `work`, but cancel it as soon as the client is gone. Raises Cancelled then."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_client_leaves(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Cancelled("The client went away.")
    finally:
        for task in (working, leaving):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def _client_leaves(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


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
    return answer


def _details(result: GenerationResult) -> dict[str, Any]:
    return {
        "finish_reason": str(result.finish),
        "generated_tokens": len(result.tokens),
        "prompt_tokens": result.prompt_tokens,
        "virtual_tokens": result.virtual_tokens,
        "seed": result.seed,
        "prefill": [],
        "tokens": [
            {
                "id": token.id,
                "text": token.text,
                # JSON has no infinity: a token that the model itself gave no chance.
                "logprob": token.logprob if math.isfinite(token.logprob) else -1e30,
                "special": token.special,
            }
            for token in result.tokens
        ],
    }


def _timing(result: GenerationResult, total: float) -> dict[str, str]:
    """Whole milliseconds, as TGI reports them."""
    seconds = {
        "x-queue-time": result.timings.queue,
        "x-prefill-time": result.timings.prefill,
        "x-decode-time": result.timings.decode,
        "x-total-time": total,
    }
    return {name: str(round(value * 1000)) for name, value in seconds.items()} | {
        "x-prompt-tokens": str(result.prompt_tokens),
        "x-generated-tokens": str(len(result.tokens)),
    }
