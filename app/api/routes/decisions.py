"""`POST /v1/decisions`: questions about one input, answered with the probabilities of their options."""

import time
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse

from app.api.auth.authenticator import needs
from app.api.auth.principal import CurrentPrincipal, Principal
from app.api.disconnect import unless_client_leaves
from app.api.middleware.timing import timing_headers
from app.api.queries import KNOWN_QUERIES
from app.api.routes.generate import ERRORS, Deadline
from app.api.routes.openai_errors import OpenAiRoute
from app.api.schemas.decision_answers import DecisionAnswer, DecisionList, DecisionUsage
from app.api.schemas.decisions import DecisionBody
from app.api.state import Services, services
from app.keys.key import Scope
from app.serving.decisions import DecisionRequest, Decisions, QuestionKind, Verdict
from app.serving.generation_request import ClassificationRequest, GenerationRequest

router = APIRouter(prefix="/v1", tags=["openai"], route_class=OpenAiRoute, dependencies=KNOWN_QUERIES)


@router.post("/decisions", response_model=DecisionList, responses=ERRORS, summary="Decide about an input")
@needs(Scope.GENERATE)
async def decisions(
    body: DecisionBody,
    request: Request,
    behind: Annotated[Services, Depends(services)],
    principal: CurrentPrincipal,
    deadline_ms: Deadline = None,
) -> JSONResponse:
    """Answer questions about one input, all in one batch: predicates, choices and scores.

    The base model answers any question; so does a task with {instructions} in its template and, for the
    options, {options}. A task with choices of its own answers with them.
    """
    begin = time.monotonic()
    principal.require(body.model)
    wanted = _request(body, request, principal, begin, deadline_ms)
    found = await unless_client_leaves(request, behind.generation.decide(wanted))
    answer: DecisionList = {
        "model": body.model,
        "answers": [_answer(verdict) for verdict in found.verdicts],
        "usage": _usage(found),
    }
    timing = timing_headers(
        [found.timings],
        time.monotonic() - begin,
        prompt_tokens=found.prompt_tokens,
        generated_tokens=found.label_tokens,
    )
    return JSONResponse(answer, headers=timing)


def _request(
    body: DecisionBody, request: Request, principal: Principal, begin: float, deadline_ms: int | None
) -> DecisionRequest:
    asked = GenerationRequest(
        classification=ClassificationRequest(choices=()),
        request_id=request.state.request_id,
        task=body.model,
        user=body.user,
        parameters={"max_new_tokens": 1},
        deadline=None if deadline_ms is None else begin + deadline_ms / 1000,
        tenant=principal.tenant,
    )
    return DecisionRequest(asked=asked, messages=body.messages(), questions=body.asked())


def _answer(verdict: Verdict) -> DecisionAnswer:
    question, found = verdict.question, verdict.probabilities
    if found is None:
        return {"type": "refusal", "name": question.name}
    if question.kind is QuestionKind.PREDICATE:
        return {
            "type": "predicate",
            "name": question.name,
            "probability": found[0],
            "label_mass": verdict.label_mass,
        }
    pairs = list(zip(question.options, found, strict=True))
    if question.kind is QuestionKind.CHOICE:
        return {
            "type": "choice",
            "name": question.name,
            "choice": question.options[verdict.best].value,
            "confidence": found[verdict.best],
            "probabilities": [{"value": option.value, "probability": p} for option, p in pairs],
            "label_mass": verdict.label_mass,
        }
    return {
        "type": "score",
        "name": question.name,
        "score": sum(level * p for level, p in enumerate(found)),
        "confidence": found[verdict.best],
        "probabilities": [
            {"value": level, "label": str(option.value), "probability": p}
            for level, (option, p) in enumerate(pairs)
        ],
        "label_mass": verdict.label_mass,
    }


def _usage(found: Decisions) -> DecisionUsage:
    return {
        "input_tokens": found.prompt_tokens,
        "input_tokens_details": {"cached_tokens": found.shared_tokens, "cache_write_tokens": 0},
        "output_tokens": found.label_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": found.prompt_tokens + found.label_tokens,
    }
