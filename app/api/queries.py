"""No query parameter goes unnoticed: a mistyped `alias` must not move `live`."""

from fastapi import Request
from fastapi.routing import APIRoute

from app.errors import InvalidRequest


async def only_known_queries(request: Request) -> None:
    """Refuse what the route doesn't declare; for routes that generate or change. Raises InvalidRequest."""
    route = request.scope["route"]
    assert isinstance(route, APIRoute)
    known = [field.alias for field in route.dependant.query_params]
    unknown = next((name for name in request.query_params if name not in known), None)
    if unknown is None:
        return
    there_is = f"there is {', '.join(known)}" if known else "this route takes none"
    raise InvalidRequest(
        f"There is no query parameter {unknown[:64]}; {there_is}.", param=unknown[:64] or None
    )
