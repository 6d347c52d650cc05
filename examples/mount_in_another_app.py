"""Mount Promptplex in another ASGI app, which any ASGI host can run.

    uvicorn --factory examples.mount_in_another_app:create_app

Then `POST /llm/generate` works beside the other app's own routes. Each process loads the base, so run one
worker. For Ray Serve, use the same app, unmounted: `serve.ingress(app.main.asgi_app())`.
"""

import contextlib
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from app.main import asgi_app


async def hello(_: Request) -> PlainTextResponse:
    """Answer the other app's own route."""
    return PlainTextResponse("Promptplex answers under /llm\n")


def create_app() -> Starlette:
    """Return the other app. Its lifespan enters that of the mounted app, which ASGI doesn't do itself."""
    promptplex = asgi_app()

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with promptplex.router.lifespan_context(promptplex):
            yield

    return Starlette(routes=[Route("/", hello), Mount("/llm", promptplex)], lifespan=lifespan)
