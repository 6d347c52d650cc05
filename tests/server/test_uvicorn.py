"""What we override and read of uvicorn, mostly undocumented: without it, protections silently go."""

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from app.api.state import ApiConfig
from app.server.connection_limits import QuietServer
from app.server.connections import BoundedConnection, server_config
from app.server.process import PromptplexServer

OVERRIDDEN: dict[type, tuple[type, set[str]]] = {
    BoundedConnection: (
        HttpToolsProtocol,
        {
            *("connection_made", "connection_lost", "data_received", "shutdown"),
            *("pause_writing", "resume_writing"),
            *("on_message_begin", "on_header", "on_headers_complete", "on_body", "on_message_complete"),
            *("on_response_complete", "_start_asgi_task"),
        },
    ),
    QuietServer: (uvicorn.Server, {"startup"}),
    PromptplexServer: (uvicorn.Server, {"capture_signals", "handle_exit", "shutdown"}),
}


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize("ours", OVERRIDDEN, ids=lambda ours: ours.__name__)
def test_what_is_overridden_is_uvicorns_own(ours: type) -> None:
    theirs, names = OVERRIDDEN[ours]
    assert names == {name for name in vars(ours) if name[:2] != "__" and hasattr(theirs, name)}
    for name in names:
        assert parameters(getattr(ours, name)) == parameters(getattr(theirs, name)), name


@pytest.mark.parametrize("ours", OVERRIDDEN, ids=lambda ours: ours.__name__)
def test_what_is_read_is_there(ours: type) -> None:
    theirs, _ = OVERRIDDEN[ours]
    own = {*vars(ours), *stored(ours.__init__)}  # type: ignore[misc]
    assert used(ours, "self") - own <= {*dir(theirs), *stored(theirs)}
    of_cycles = used(ours, "cycle", "running", "self.cycle", "self._running")
    assert of_cycles <= stored(RequestResponseCycle)


def attributes(source: Any, *owners: str) -> list[ast.Attribute]:
    nodes = ast.walk(ast.parse(textwrap.dedent(inspect.getsource(source))))
    found = [node for node in nodes if isinstance(node, ast.Attribute)]
    return [node for node in found if ast.unparse(node.value) in owners]


def used(source: Any, *owners: str) -> set[str]:
    return {node.attr for node in attributes(source, *owners)}


def stored(source: Any) -> set[str]:
    return {node.attr for node in attributes(source, "self") if isinstance(node.ctx, ast.Store)}


def test_connections_are_ours() -> None:
    config = server_config(lambda *_: None, ApiConfig())  # type: ignore[arg-type,return-value]
    config.load()
    assert config.http_protocol_class.func is BoundedConnection  # type: ignore[attr-defined]
