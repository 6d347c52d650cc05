"""Errors of the OpenAI routes, in the terms of their bodies and of OpenAI's clients."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from app.api.errors import envelope
from app.api.middleware.load_shedding import GatedRoute
from app.api.state import Services, services
from app.errors import ContextLengthExceeded, InvalidRequest, NotFound, RequestTooLong

_NAMES_OF_TASKS = ("task_id", "alias")  # params of a malformed reference


class OpenAiRoute(GatedRoute):
    """A route with bodies that name a model instead of a task."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler, with errors restated."""
        handle = super().get_route_handler()

        async def restating(request: Request) -> Response:
            try:
                return await handle(request)
            except NotFound as error:
                return _no_model(error)
            except RequestTooLong as error:
                raise _too_long(error, request, await services(request)) from None
            except InvalidRequest as error:
                if error.param in _NAMES_OF_TASKS:
                    return _no_model(error)
                raise _restated(error, request) from None

        return restating


def _no_model(error: NotFound | InvalidRequest) -> JSONResponse:
    """Answer that there is no model with this name, also where the name is malformed."""
    message = error.message.rstrip(".").replace("There is no task", "There is no model")
    body = envelope(
        f"{message}; GET /v1/models lists all models.",
        kind="invalid_request_error",
        code="model_not_found",
        param="model",
    )
    return JSONResponse(body, 404)


def _too_long(error: RequestTooLong, request: Request, behind: Services) -> ContextLengthExceeded:
    """Restate it as OpenAI does: clients look for this text, and don't know `max_new_tokens`."""
    words, bound = _inputs_of(request), _bound_of(request)
    limit = error.limit or behind.engine.geometry.max_positions
    return ContextLengthExceeded(
        f"This model's maximum context length is {limit} tokens. However, you requested {error.asked}. "
        f"Please reduce the length of the {words}, or {bound or 'of the questions'}.",
        param=bound if bound and (error.param or "").endswith("max_new_tokens") else words,
    )


def _inputs_of(request: Request) -> str:
    path = request.url.path
    return (
        "input" if path.endswith(("/responses", "/decisions")) else "messages" if "chat" in path else "prompt"
    )


def _bound_of(request: Request) -> str | None:
    """Return what bounds an answer; None: nothing is generated."""
    if request.url.path.endswith("/decisions"):
        return None
    return "max_output_tokens" if request.url.path.endswith("/responses") else "max_tokens"


def _restated(error: InvalidRequest, request: Request) -> InvalidRequest:
    """Restate the error with the name that the body has for inputs."""
    words = _inputs_of(request)
    if error.param == "inputs":
        error.param = words
        error.message = error.message.replace("inputs", words)
    elif error.param is not None:
        error.param = error.param.removeprefix("parameters.")
    return error
