"""A short way to an endpoint for bodies without a fault; all else is left to FastAPI's own handler.

FastAPI works out every dependency and parameter of a request anew, which takes longer than all else that
the event loop does for a short answer. Its words for what is wrong are kept: where anything differs from the
plain case, its handler reads the request again.
"""

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from inspect import iscoroutinefunction, signature
from typing import Any

from fastapi import Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

SMALL_BYTES = 32 << 10  # of a body that is read in less than a millisecond
_JSON = "application/json"


@dataclass(frozen=True, slots=True)
class DirectCall:
    """An endpoint that takes a body in JSON, the request, and what depends on the request alone."""

    dependant: Dependant
    body_field: Any  # validates the body
    optional: tuple[tuple[str, str, Any], ...]  # name, header and default of each other parameter

    @classmethod
    def of(cls, route: APIRoute) -> "DirectCall | None":
        """Return the short way to a route's endpoint; None: there is none."""
        dependant, body_field = route.dependant, route.body_field
        others = (*dependant.path_params, *dependant.query_params, *dependant.cookie_params)
        is_plain = (
            not others
            and len(dependant.body_params) == 1
            and all(_takes_request_alone(each) for each in dependant.dependencies)
            and all(not each.field_info.is_required() for each in dependant.header_params)
            and not any((dependant.response_param_name, dependant.background_tasks_param_name))
            and iscoroutinefunction(dependant.call)
            and _returns_response(dependant.call)
        )
        if not is_plain or body_field is None:
            return None
        optional = tuple((each.name, each.alias, each.default) for each in dependant.header_params)
        return cls(dependant, body_field, optional)

    async def answer(self, request: Request) -> Response | None:
        """Return the endpoint's response; None, before it is called: FastAPI shall read the request."""
        headers = request.headers
        if headers.get("content-type") != _JSON or any(header in headers for _, header, _ in self.optional):
            return None
        try:
            if len(await request.body()) > SMALL_BYTES:
                return None
            given = await request.json()
        except Exception:  # it fails there again
            return None
        dependant = self.dependant
        values: dict[str, Any] = {name: default for name, _, default in self.optional}
        for each in dependant.dependencies:
            found = await _called(each)(request)
            if each.name is not None:
                values[each.name] = found
        body, errors = self.body_field.validate(given, {}, loc=("body",))
        if given is None or errors:
            return None
        values[dependant.body_params[0].name] = body
        if dependant.request_param_name is not None:
            values[dependant.request_param_name] = request
        response = await _called(dependant)(**values)
        assert isinstance(response, Response)
        return response


def _called(dependant: Dependant) -> Callable[..., Coroutine[Any, Any, Any]]:
    assert dependant.call is not None
    return dependant.call


def _takes_request_alone(dependant: Dependant) -> bool:
    params = [] if dependant.call is None else [*signature(dependant.call).parameters]
    return (
        iscoroutinefunction(dependant.call) and len(params) == 1 and dependant.request_param_name == params[0]
    )


def _returns_response(endpoint: Any) -> bool:
    annotation = signature(endpoint, eval_str=True).return_annotation
    return isinstance(annotation, type) and issubclass(annotation, Response)
