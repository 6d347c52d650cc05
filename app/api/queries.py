"""No query parameter goes unnoticed: a mistyped `alias` must not move `live`."""

from fastapi import Depends, Request
from fastapi.routing import APIRoute

from app.errors import InvalidRequest


async def only_known_queries(request: Request) -> None:
    """Refuse what the route doesn't declare; for routes that generate or change. Raises InvalidRequest."""
    route = request.scope["route"]
    assert isinstance(route, APIRoute)
    known = [field.alias for field in route.dependant.query_params]
    given = [name for name, _ in request.query_params.multi_items()]
    twice = next((name for name in given if name in known and given.count(name) > 1), None)
    if twice is not None:
        raise InvalidRequest(f"The query parameter {twice} was sent twice; send it once.", param=twice)
    unknown = next((name for name in request.query_params if name not in known), None)
    if unknown is None:
        return
    there_is = f"there is {', '.join(known)}" if known else "this route takes none"
    raise InvalidRequest(
        f"There is no query parameter {unknown[:64]}; {there_is}.", param=unknown[:64] or None
    )


KNOWN_QUERIES = (Depends(only_known_queries),)
