"""Describe keys in the OpenAPI document of a server that has some."""

from typing import Any

from fastapi import FastAPI
from fastapi.routing import iter_route_contexts

from app.api.auth.authenticator import Access, declared_access

_SCHEME = "bearer"
_ENVELOPE = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorEnvelope"}}}
_RETRY_AFTER = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds until the next try"}}
_UNAUTHORIZED = {"description": "The key is missing or unknown", "content": _ENVELOPE}
_FORBIDDEN = {"description": "The key lacks the scope, or doesn't reach the task", "content": _ENVELOPE}
_RATE_LIMITED = {
    "description": "The key has used up its quota",
    "content": _ENVELOPE,
    "headers": _RETRY_AFTER,
}


def describe_keys(app: FastAPI) -> None:
    """Add the bearer scheme to the app's document, and each route's answers to keys that don't suffice."""
    document = app.openapi()
    schemes = document.setdefault("components", {}).setdefault("securitySchemes", {})
    schemes[_SCHEME] = {
        "type": "http",
        "scheme": "bearer",
        "description": "An API key, made by `promptplex keys add`",
    }
    for route in iter_route_contexts(app.routes):
        operations = document["paths"].get(route.path_format, {})
        for method in route.methods or ():
            if method.lower() in operations:
                _describe(operations[method.lower()], declared_access(route))


def _describe(operation: dict[str, Any], access: Access | None) -> None:
    if access is not None and access.is_public:
        operation["security"] = []
        return
    operation["security"] = [{_SCHEME: []}]
    if access is not None and access.scopes:
        needed = " or ".join(sorted(access.scopes))
        operation["description"] = f"{operation.get('description', '')}\n\nScope: {needed}.".lstrip()
    responses = operation["responses"]
    responses.setdefault("401", _UNAUTHORIZED)
    responses.setdefault("403", _FORBIDDEN)
    if access is not None and access.is_counted:
        responses.setdefault("429", _RATE_LIMITED)
