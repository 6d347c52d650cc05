"""The HTTP application: routes, errors, edge."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import Depends, FastAPI

from app import __version__
from app.api import errors, generate, openai, ops, tasks, tokens
from app.api.access import Door, any_key
from app.api.edge import Edge
from app.api.key_document import describe_keys
from app.api.queries import only_known_queries
from app.api.state import ApiConfig, ServerState
from app.keys.keyring import Keyring

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[Any]]


def create_app(
    state: ServerState,
    config: ApiConfig | None = None,
    *,
    keys: Keyring | None = None,
    lifespan: Lifespan | None = None,
) -> FastAPI:
    """The app over `state`, whose services may come later, when the base model is loaded.

    With `keys`, only what is declared public answers without one; None: everybody may do everything.
    """
    config = config or ApiConfig()
    app = FastAPI(
        title="Promptplex",
        version=__version__,
        summary="One frozen language model, thousands of tasks, each a small trained prompt.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.server = state
    app.state.config = config
    errors.install(app)
    strict = [Depends(only_known_queries)]
    app.include_router(generate.router, dependencies=strict)
    app.include_router(tokens.router, dependencies=strict)
    app.include_router(openai.router, dependencies=strict)
    app.include_router(tasks.router, dependencies=strict)
    app.include_router(ops.router)  # probes and scrapers may add queries of their own
    app.add_middleware(Edge, config=config, door=Door(keys, state.on_refusal))
    for route in app.routes:
        if getattr(route, "path", None) == app.openapi_url:
            any_key(getattr(route, "endpoint", None))
    if keys is not None:
        describe_keys(app)
    return app
