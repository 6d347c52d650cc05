"""From bodies of OpenAI's routes to requests of the generation service."""

import time
from collections.abc import Sequence
from typing import Any

from fastapi import Request

from app.api.auth.principal import Principal
from app.api.schemas.openai_body import OpenAiBody
from app.errors import InvalidRequest
from app.serving.generation_request import GenerationRequest

MAX_ANSWERS = 128  # prompts times n

# What clients of this API expect where neither they nor the task say how to choose tokens, whatever the base
# says; what it says of filters counts.
_FALLBACKS = {"do_sample": True, "temperature": 1.0}


def generation_requests(
    body: OpenAiBody,
    inputs: Sequence[dict[str, Any]],
    request: Request,
    principal: Principal,
    deadline_ms: int | None,
) -> list[GenerationRequest]:
    """Return one request for each prompt, all with the parameters of the body.

    Raise InvalidRequest where they are too many.
    """
    drawn = max(body.num_candidates or body.num_answers, body.vote.n if body.vote else 1)
    if len(inputs) * drawn > MAX_ANSWERS:
        raise InvalidRequest(
            f"{len(inputs)} prompts with {drawn} answers each are more than {MAX_ANSWERS}; send fewer.",
            param="n",
        )
    begin = time.monotonic()
    parameters, constraint, bias = body.generation(), body.constraint(), body.bias()
    return [
        GenerationRequest(
            **each,
            num_samples=body.num_answers,
            best_of=body.num_candidates,
            vote=None if body.vote is None else body.vote.request(),
            request_id=request.state.request_id,
            task=body.model,
            user=body.user,
            parameters=parameters,
            fallbacks=_FALLBACKS,
            constraint=constraint,
            logit_bias=bias,
            deadline=None if deadline_ms is None else begin + deadline_ms / 1000,
            tenant=principal.tenant,
            require=principal.require,
        )
        for each in inputs
    ]
