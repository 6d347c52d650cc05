"""Exceptions as HTTP responses, all in one envelope: that of the OpenAI API."""

import logging
import math
import re
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import iter_route_contexts
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from app import errors
from app.api.schemas.answers import ErrorEnvelope, TgiErrorType
from app.api.schemas.generate import Parameters
from app.validation import EXPECTED, PLAIN, message_of

_Text = TypeVar("_Text", str, str | None)

log = logging.getLogger("promptplex.api")

# status, type, code. The first entry that matches the exception's class or one of its bases counts.
_MAPPING: Mapping[type[errors.PromptplexError], tuple[int, str, str]] = {
    errors.ContextLengthExceeded: (400, "invalid_request_error", "context_length_exceeded"),
    errors.RequestTooLong: (422, "invalid_request_error", "request_too_long"),
    errors.InvalidRequest: (422, "invalid_request_error", "invalid_request"),
    errors.UnsafeFile: (415, "invalid_request_error", "unsafe_file"),
    errors.PromptRejected: (422, "invalid_request_error", "prompt_rejected"),
    errors.NotFound: (404, "invalid_request_error", "not_found"),
    errors.NotServable: (422, "invalid_request_error", "not_servable"),
    errors.Conflict: (409, "invalid_request_error", "conflict"),
    errors.PayloadTooLarge: (413, "invalid_request_error", "payload_too_large"),
    errors.Unauthorized: (401, "invalid_request_error", "unauthorized"),
    errors.Forbidden: (403, "invalid_request_error", "forbidden"),
    errors.RateLimited: (429, "rate_limit_error", "rate_limited"),
    errors.Overloaded: (503, "server_error", "overloaded"),
    errors.EngineStopped: (503, "server_error", "not_ready"),
    errors.Unavailable: (503, "server_error", "unavailable"),
    errors.DeadlineExceeded: (504, "server_error", "deadline_exceeded"),
    errors.Cancelled: (503, "server_error", "cancelled"),
    errors.NonFiniteLogits: (500, "server_error", "non_finite_logits"),
    errors.RequestFailed: (500, "server_error", "request_failed"),
    errors.ConstraintFailed: (422, "invalid_request_error", "constraint_failed"),
    errors.CorruptData: (500, "server_error", "corrupt_data"),
    errors.StoreFull: (507, "server_error", "store_full"),
    errors.UnsupportedModel: (500, "server_error", "unsupported_model"),
}

_ROUTING = {
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    413: "payload_too_large",
    415: "unsupported_media_type",
}
_OF_ONE_REQUEST = (errors.InvalidRequest, RequestValidationError, HTTPException)
_Handler = Callable[[Request, Exception], Awaitable[JSONResponse]]
_TGI_TYPES: Mapping[str, TgiErrorType] = {
    "non_finite_logits": "generation",
    "constraint_failed": "generation",
    "internal": "generation",
    "overloaded": "overloaded",
    "not_ready": "overloaded",
    "unavailable": "overloaded",
    "invalid_request": "validation",
    "request_too_long": "validation",
    "context_length_exceeded": "validation",
    "payload_too_large": "validation",
}
_OPENAI_PATHS = ("/chat/completions", "/completions", "/decisions", "/models", "/responses")
_VERSIONS = re.compile(r"^(?:/v1)+")
_MOST_PROBLEMS = 8
_FIELD = re.compile(r"(?!(?:str|int|float|bool|dict|list)$)[a-z_]+")
_INTERNAL = "Something went wrong inside the server; its log has the details under this X-Request-Id."


def envelope(message: str, *, kind: str, code: str, param: str | None = None) -> ErrorEnvelope:
    """Return the body of every error: OpenAI's, and beside it TGI's error type, where it has one.

    Text that is quoted may hold halves of surrogate pairs, which JSON can't carry.
    """
    body: ErrorEnvelope = {
        "error": {"message": _printable(message), "type": kind, "param": _printable(param), "code": code}
    }
    if code in _TGI_TYPES:
        body["error_type"] = _TGI_TYPES[code]
    return body


def _printable(text: _Text) -> _Text:
    return text if text is None else text.encode("utf-8", "replace").decode()


def error_response(error: BaseException) -> JSONResponse:
    """Return the response to an exception; an unexpected one says nothing about its cause."""
    if isinstance(error, errors.PromptplexError):
        return _ours(error)
    return JSONResponse(envelope(_INTERNAL, kind="server_error", code="internal"), 500)


def refusal(status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return the response to a request that reaches no route."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return JSONResponse(envelope(message, kind=kind, code=code), status, headers)


def _ours(error: errors.PromptplexError) -> JSONResponse:
    known = next((kind for kind in type(error).__mro__ if kind in _MAPPING), None)
    status, kind, code = (500, "server_error", "internal") if known is None else _MAPPING[known]
    param = error.param if isinstance(error, errors.InvalidRequest) else None
    headers = {}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if status in (429, 503):
        seconds = error.retry_after if isinstance(error, errors.Unavailable) else 1.0
        headers["retry-after"] = str(max(1, math.ceil(seconds)))
    message = error.message
    # The store can't say so: it knows no routes.
    if isinstance(error, errors.NotFound) and message.startswith("There is no task"):
        message = f"{message.rstrip('.')}; GET /tasks lists them."
    return JSONResponse(envelope(message, kind=kind, code=code, param=param), status, headers)


def install(app: FastAPI) -> None:
    """Answer every exception that a route or the routing raises."""
    app.add_exception_handler(errors.PromptplexError, _letting_go(_on_ours))
    app.add_exception_handler(RequestValidationError, _letting_go(_on_validation))
    app.add_exception_handler(HTTPException, _letting_go(_on_http))
    app.add_exception_handler(ClientDisconnect, _letting_go(_on_disconnect))


def _letting_go(handler: _Handler) -> _Handler:
    """Wrap a handler so that it clears the exception's frames in the end.

    A task holds its exception, and the exception the frames that hold the task: without this a refused body
    would stay until the garbage collector finds the cycle. Exceptions that the engine gives to several
    requests at once are left as they are, since some of their frames may still run.
    """

    async def handle(request: Request, error: Exception) -> JSONResponse:
        try:
            return await handler(request, error)
        finally:
            if isinstance(error, _OF_ONE_REQUEST):
                traceback.clear_frames(error.__traceback__)

    return handle


async def _on_ours(request: Request, error: Exception) -> JSONResponse:
    response = error_response(error)
    if response.status_code == 500:
        said = isinstance(error, errors.CorruptData)  # where it was noticed adds nothing to what is damaged
        log.error("%s %s: %s", request.method, request.url.path, error, exc_info=None if said else error)
    return response


async def _on_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = _ROUTING.get(error.status_code, "invalid_request")
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    message, param = _routing_message(request, error), getattr(error, "param", None)
    headers = {"allow": _allowed(request)} if error.status_code == 405 else error.headers
    return JSONResponse(envelope(message, kind=kind, code=code, param=param), error.status_code, headers)


def _allowed(request: Request) -> str:
    """Return the methods of all routes at the request's path; starlette knows the first one's only."""
    routes = iter_route_contexts(request.app.routes)
    here = [route.methods or () for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    methods = {method for methods in here for method in methods}
    return ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))


def _routing_message(request: Request, error: HTTPException) -> str:
    where = f"{request.method} {request.url.path[:256]}"
    if error.status_code == 404:
        below = _VERSIONS.sub("", request.url.path)
        if below in _OPENAI_PATHS:
            return f"There is no route {where}; it is /v1{below}: the client's base URL ends with /v1, once."
        return f"There is no route {where}; GET /openapi.json lists all."
    if error.status_code == 405:
        return f"The route does not take {where}; GET /openapi.json lists what it takes."
    return str(error.detail)


async def _on_disconnect(request: Request, error: Exception) -> JSONResponse:
    return _ours(errors.Cancelled("The client went away."))


async def _on_validation(request: Request, error: Exception) -> JSONResponse:
    """Report problems by their paths, never by values, which may be private."""
    assert isinstance(error, RequestValidationError)
    problems = _by_place(error)
    message = (
        "; ".join(_describe(path, found, request.url.path) for path, found in problems.items())
        or "The request is malformed"
    )
    param = next(iter(problems), None)
    return JSONResponse(
        envelope(message + ".", kind="invalid_request_error", code="invalid_request", param=param), 422
    )


def _by_place(error: RequestValidationError) -> dict[str | None, list[Mapping[str, Any]]]:
    """Return the first problems by their paths.

    pydantic reports each alternative of a union: those that match less of the value are left out.
    """
    found: dict[str | None, list[Mapping[str, Any]]] = {}
    for problem in error.errors()[:_MOST_PROBLEMS]:
        found.setdefault(_path(problem, error.body), []).append(problem)
    deeper = [path for path in found if path is not None]
    return {
        path: problems
        for path, problems in found.items()
        if path is None or not any(other.startswith(f"{path}.") for other in deeper)
    }


def _describe(path: str | None, problems: list[Mapping[str, Any]], route: str) -> str:
    """Return a sentence without its full stop; several problems at one path are alternatives."""
    problem = problems[0]
    kind = problem["type"]
    if kind == "json_invalid":
        why = str(problem.get("ctx", {}).get("error", "malformed")).removesuffix(" at")
        return f"The body is not JSON: {why} at character {problem['loc'][-1]}"
    if kind == "extra_forbidden":
        return f"There is no field {path}; {_instead_of(path, route)}"
    if kind in ("model_attributes_type", "missing") and path is None:
        return "The body must be a JSON object, with the header content-type: application/json"
    if kind == "finite_number":
        return f"{path} must be a finite number"
    first, *others = dict.fromkeys(map(message_of, _of_its_type(problems)))
    message = " or ".join([first, *(other.removeprefix(EXPECTED) for other in others)])
    if path is None:
        return message
    return f"{path} {message}" if kind == PLAIN else f"{path}: {message}"


def _instead_of(path: str | None, route: str) -> str:
    """Return what to do about an unknown field; many are those of the other protocol's place."""
    if path in Parameters.model_fields and route.endswith(("/generate", "/generate_stream")):
        return f"send it as parameters.{path}"
    if path == "parameters" and "/v1/" in route:
        return "send its fields in the body itself"
    return "GET /openapi.json lists the fields"


def _of_its_type(problems: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the problems of alternatives that have the value's type; where none has it, all."""
    closer = [each for each in problems if not each["type"].endswith(("_type", "literal_error"))]
    return closer or problems


def _path(problem: Mapping[str, Any], body: Any) -> str | None:
    """Return where in the body, or query, the problem is, such as `parameters.top_p`."""
    source, *parts = problem["loc"]
    if problem["type"] == "json_invalid":
        return None  # the place is a number of characters
    if source == "body":
        parts = [*_walk(body, parts)]
    return ".".join(str(part)[:64] for part in parts) or None


def _walk(value: Any, parts: list[Any]) -> Iterator[Any]:
    """Yield the parts of a path that are in the body, or missing from it; pydantic adds alternatives."""
    for part in parts:
        is_item = isinstance(value, list) and isinstance(part, int)
        if is_item or (isinstance(value, Mapping) and part in value):
            value = value[part]
            yield part
        elif part is parts[-1] and isinstance(value, Mapping) and _FIELD.fullmatch(str(part)):
            yield part
