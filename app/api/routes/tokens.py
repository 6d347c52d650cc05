"""`POST /tokenize` and `/detokenize`: text to token ids, with a task's template, and back."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse

from app.api.auth.authenticator import needs
from app.api.auth.principal import CurrentPrincipal
from app.api.middleware.load_shedding import GatedRoute
from app.api.queries import KNOWN_QUERIES
from app.api.routes.generate import ERRORS
from app.api.schemas.answers import Text, Tokenization
from app.api.schemas.generate import DetokenizeRequest, TokenizeRequest
from app.api.state import Services, services
from app.keys.key import Scope
from app.serving.generation_request import GenerationRequest

router = APIRouter(tags=["tokens"], route_class=GatedRoute, dependencies=KNOWN_QUERIES)

Behind = Annotated[Services, Depends(services)]


@router.post("/tokenize", response_model=Tokenization, responses=ERRORS, summary="Tokenize text")
@needs(Scope.GENERATE)
async def tokenize(
    body: TokenizeRequest, request: Request, behind: Behind, principal: CurrentPrincipal
) -> JSONResponse:
    """Return the token ids of a request with these inputs, BOS or EOS included; virtual tokens count apart.

    Of an encoder-decoder they are what the encoder reads.
    """
    principal.require(body.task_id or behind.generation.base_name)
    wanted = GenerationRequest(
        inputs=body.inputs,
        request_id=request.state.request_id,
        task=body.task_id,
        parameters={"max_new_tokens": 1},
        tenant=principal.tenant,
    )
    admitted, texts = await behind.generation.tokenize(wanted)
    ids = admitted.prompt_ids
    answer: Tokenization = {
        "tokens": [{"id": id_, "text": text} for id_, text in zip(ids, texts, strict=True)],
        "prompt_tokens": len(ids),
        "virtual_tokens": admitted.virtual_tokens,
        "text": admitted.prompt_text,
    }
    return JSONResponse(answer)


@router.post("/detokenize", response_model=Text, responses=ERRORS, summary="Detokenize token ids")
@needs(Scope.GENERATE)
async def detokenize(body: DetokenizeRequest, behind: Behind) -> JSONResponse:
    """Return the text of token ids, as many as a request may have; special tokens have no text."""
    answer: Text = {"text": await behind.generation.detokenize(body.ids)}
    return JSONResponse(answer)
