"""Refuse requests that can't be served now before their bodies are read and tokenized."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response

from app.api.schemas.bodies import JsonRoute
from app.api.state import services


class GatedRoute(JsonRoute):
    """A route that generates or tokenizes: while the server isn't ready, or is full, its answer is 503."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's own handler, which reads the body, behind the gate."""
        handle = super().get_route_handler()
        if self.methods == {"GET"}:
            return handle

        async def gated(request: Request) -> Response:
            (await services(request)).generation.limiter.check()
            return await handle(request)

        return gated
