"""What the OpenAPI document says of keys, where there are keys."""

from typing import Any

from fastapi import FastAPI
from fastapi.routing import iter_route_contexts

from app.api.auth.authenticator import Access, declared_access

_SCHEME = "bearer"
_ENVELOPE = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorEnvelope"}}}
_RETRY_AFTER = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds"}}
_UNAUTHORIZED = {"description": "No key, or none that is known", "content": _ENVELOPE}
_FORBIDDEN = {"description": "The key lacks the scope or the task", "content": _ENVELOPE}
_RATE_LIMITED = {
    "description": "The key has used up its quota",
    "content": _ENVELOPE,
    "headers": _RETRY_AFTER,
}


def describe_keys(app: FastAPI) -> None:
    """Add the bearer scheme to the app's document, and what each route answers where a key isn't enough."""
    document = app.openapi()
    schemes = document.setdefault("components", {}).setdefault("securitySchemes", {})
    schemes[_SCHEME] = {"type": "http", "scheme": "bearer", "description": "`promptplex keys add` makes keys"}
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
