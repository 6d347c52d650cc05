"""`POST /tokenize` and `/detokenize`: what a text becomes for the base model, with a task's template."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse

from app.api.auth.authenticator import needs
from app.api.auth.principal import Calling
from app.api.middleware.load_shedding import GatedRoute
from app.api.routes.generate import ERRORS
from app.api.schemas.answers import Text, Tokenization
from app.api.schemas.generate import DetokenizeRequest, TokenizeRequest
from app.api.state import Services, services
from app.keys.key import Scope
from app.serving.generation_request import GenerationRequest

router = APIRouter(tags=["tokens"], route_class=GatedRoute)

Behind = Annotated[Services, Depends(services)]


@router.post("/tokenize", response_model=Tokenization, responses=ERRORS, summary="Text to token ids")
@needs(Scope.GENERATE)
async def tokenize(body: TokenizeRequest, request: Request, behind: Behind, calling: Calling) -> JSONResponse:
    """The ids that a request with these inputs would have, BOS included; learned tokens are counted apart."""
    calling.require(body.task_id or behind.generation.base_name)
    ask = GenerationRequest(
        inputs=body.inputs,
        request_id=request.state.request_id,
        task=body.task_id,
        parameters={"max_new_tokens": 1},
        tenant=calling.tenant,
    )
    with behind.generation.limiter.hold(1):
        admitted = await behind.generation.admit(ask)
        ids = admitted.prompt_ids
        texts = await behind.generation.on_thread(lambda: behind.generation.texts_of(ids), 4 * len(ids))
    tokens: list[dict[str, Any]] = [{"id": id_, "text": text} for id_, text in zip(ids, texts, strict=True)]
    return JSONResponse(
        {
            "tokens": tokens,
            "prompt_tokens": len(tokens),
            "virtual_tokens": admitted.request.num_virtual_tokens,
            "text": admitted.prompt_text,
        }
    )


@router.post("/detokenize", response_model=Text, responses=ERRORS, summary="Token ids to text")
@needs(Scope.GENERATE)
async def detokenize(body: DetokenizeRequest, behind: Behind) -> JSONResponse:
    """The text of the ids, as many as a request may hold; special tokens have none."""
    admission = behind.generation.request_builder
    with behind.generation.limiter.hold(1):
        text = await behind.generation.on_thread(
            lambda: admission.text_of(body.ids, "ids"), 4 * len(body.ids)
        )
    return JSONResponse({"text": text})
