"""Mount Promptplex in another ASGI app, which any ASGI host can run.

    uvicorn --factory examples.mount_in_another_app:create_app

Then `POST /llm/generate` generates, beside the other app's own routes. Each process loads the base, so run
one worker. Ray Serve takes the same app, unmounted: `serve.ingress(app.main.asgi_app())`.
"""

import contextlib
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from app.main import asgi_app


async def hello(_: Request) -> PlainTextResponse:
    """Answer a route of the other app."""
    return PlainTextResponse("Promptplex answers under /llm\n")


def create_app() -> Starlette:
    """Return the other app, whose lifespan enters that of the app mounted in it: ASGI doesn't."""
    promptplex = asgi_app()

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with promptplex.router.lifespan_context(promptplex):
            yield

    return Starlette(routes=[Route("/", hello), Mount("/llm", promptplex)], lifespan=lifespan)
