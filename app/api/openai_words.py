"""What goes wrong on the routes of OpenAI's protocol, in the words of their bodies and of its clients."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from app.api.errors import envelope
from app.api.gate import GatedRoute
from app.errors import InvalidRequest, NotFound

_NAMES_OF_TASKS = ("task_id", "alias")  # what is said of a malformed reference


class OpenAiRoute(GatedRoute):
    """A route whose bodies name a model where others name a task."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, with errors restated."""
        handle = super().get_route_handler()

        async def restating(request: Request) -> Response:
            try:
                return await handle(request)
            except NotFound as error:
                return _no_model(error)
            except InvalidRequest as error:
                if error.param in _NAMES_OF_TASKS:
                    return _no_model(error)
                raise _restated(error, request) from None

        return restating


def _no_model(error: NotFound | InvalidRequest) -> JSONResponse:
    """No model is called so, be it that nothing could be."""
    message = error.message.rstrip(".").replace("There is no task", "There is no model")
    body = envelope(
        f"{message}; GET /v1/models lists them.",
        kind="invalid_request_error",
        code="model_not_found",
        param="model",
    )
    return JSONResponse(body, 404)


def _restated(error: InvalidRequest, request: Request) -> InvalidRequest:
    """The same error, of what the body calls its inputs."""
    words = "messages" if "chat" in request.url.path else "prompt"
    if error.param == "inputs":
        error.param = words
        error.message = error.message.replace("inputs", words)
    return error
