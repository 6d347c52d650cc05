from collections.abc import Iterator

import httpx
import pytest

from app.api.state import ServerState
from tests.api.server import client_of, services_of, serving
from tests.serving.stack import Stack, running_stack


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("store")) as running:
        yield running


@pytest.fixture(scope="session")
def url(stack: Stack) -> Iterator[str]:
    with serving(ServerState(services=services_of(stack))) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with client_of(url) as opened:
        yield opened
