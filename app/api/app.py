"""The HTTP application: routes, errors, middleware."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from app import __version__
from app.api import errors
from app.api.auth.authenticator import Authenticator, any_key
from app.api.auth.openapi_security import describe_keys
from app.api.middleware.access_log import AccessLog
from app.api.middleware.request_guard import RequestGuard
from app.api.middleware.timing import TIMING_HEADERS
from app.api.middleware.tracing import Tracing
from app.api.queries import KNOWN_QUERIES
from app.api.routes import (
    decisions,
    generate,
    live,
    openai,
    ops,
    responses,
    tasks,
    tokens,
    training,
)
from app.api.state import ApiConfig, ServerState
from app.keys.keyring import Keyring

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[Any]]


def create_app(
    state: ServerState,
    config: ApiConfig | None = None,
    *,
    keys: Keyring | None = None,
    lifespan: Lifespan | None = None,
    tracer: "Tracer | None" = None,
) -> FastAPI:
    """Return the app over `state`, which gets its services when the base model is loaded.

    With `keys`, only routes declared public answer without one; None: every client may do everything.
    With a `tracer`, every request but probes is a span.
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
    app.state.live = live.LiveFeed(state)
    errors.install(app)
    app.include_router(generate.router)
    app.include_router(tokens.router)
    app.include_router(openai.router)
    app.include_router(responses.router)
    app.include_router(decisions.router)
    # Below /tasks/{task_id:path}, which takes all.
    app.include_router(training.router, dependencies=KNOWN_QUERIES)
    app.include_router(tasks.router, dependencies=KNOWN_QUERIES)
    app.include_router(ops.router)  # probes and scrapers may add queries of their own
    app.include_router(live.router, dependencies=KNOWN_QUERIES)
    app.add_middleware(
        RequestGuard, config=config, state=state, authenticator=Authenticator(keys, state.on_refusal)
    )
    for route in app.routes:
        if getattr(route, "path", None) == app.openapi_url:
            any_key(getattr(route, "endpoint", None))
    if keys is not None:
        describe_keys(app)
    _add_outer_layers(app, config, tracer)
    return app


def _add_outer_layers(app: FastAPI, config: ApiConfig, tracer: "Tracer | None") -> None:
    """Add layers from the inside out; without allowed origins no answer has a CORS header."""
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["*"],  # clients have their own (x-stainless-...); the origin decides
            expose_headers=["X-Request-Id", "Retry-After", *TIMING_HEADERS],
        )
    if tracer is not None:
        app.add_middleware(Tracing, tracer=tracer)
    app.add_middleware(AccessLog)
