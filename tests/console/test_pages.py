"""The console's files over HTTP: what is sent, under which headers, and that no path leads elsewhere."""

import asyncio
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.api.state import ServerState
from app.console.pages import read_pages
from app.keys.key_file import change_keys
from app.keys.keyring import Keyring
from app.main import asgi_app
from app.settings import Settings
from tests.api.server import client_of, raw_exchange, serving

STATIC = Path(__file__).parent.parent.parent / "app/console/static"
# uPlot 1.6.32 as its authors publish it; to take a newer one, replace files and digests together.
VENDORED = {
    "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    "LICENSE": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server that still loads: the console needs nothing of it."""
    with serving(ServerState(), console=True) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with client_of(url) as opened:
        yield opened


def test_the_page_and_all_that_it_names(client: httpx.Client) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    named = re.findall(r'(?:src|href)="(console/[^"]+)"', page.text)
    assert len(named) >= 4
    for path in named:
        assert client.get(f"/{path}").status_code == 200, path
    modules = [path for path in read_pages() if path.endswith(".js") and "/" not in path]
    for path in modules:
        file = client.get(f"/console/{path}")
        assert file.headers["content-type"].startswith("text/javascript")
        for imported in re.findall(r'from "\./([^"]+)"', file.text):
            assert imported in modules, f"{path} imports {imported}"


def test_every_file_may_run_only_what_is_its_own(client: httpx.Client) -> None:
    for path in ("/", "/console/main.js", "/console/style.css", "/console/icon.svg"):
        headers = client.get(path).headers
        rules = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
        assert rules["default-src"] == rules["base-uri"] == rules["frame-ancestors"] == "'none'"
        assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-cache"
        assert "set-cookie" not in headers


def test_nothing_comes_from_elsewhere() -> None:
    own = [path for path in STATIC.iterdir() if path.is_file()]
    for path in own:
        foreign = set(re.findall(r"https?://[\w.]+", path.read_text())) - {"http://www.w3.org"}  # SVG's name
        assert not foreign, f"{path.name}: {foreign}"
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", path.read_text()
        )


def test_what_is_vendored_is_unchanged() -> None:
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (STATIC / "vendor").iterdir()
    }
    assert found == VENDORED


def test_a_file_is_sent_again_only_when_it_changed(client: httpx.Client) -> None:
    first = client.get("/console/style.css")
    again = client.get("/console/style.css", headers={"if-none-match": f'"other", W/{first.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get("/console/style.css", headers={"if-none-match": '"other"'}).content == first.content
    head = client.head("/console/style.css")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(first.content))


@pytest.mark.parametrize(
    "path",
    [
        "/console/",
        "/console/nothing.js",
        "/console/../pages.py",
        "/console/%2e%2e/pages.py",
        "/console/..%2fpages.py",
        "/console//etc/passwd",
        "/console/vendor/../../pages.py",
        "/console/vendor",
        "/console/vendor/LICENSE",
        "/console/main.js%00.html",
    ],
)
def test_no_other_path_is_a_file(url: str, path: str) -> None:
    answer = raw_exchange(url, f"GET {path} HTTP/1.1\nHost: localhost\n\n")
    assert answer.startswith(b"HTTP/1.1 404"), answer[:200]


def test_it_is_public_where_all_else_wants_a_key(tmp_path: Path) -> None:
    change_keys(tmp_path / "keys.json", lambda keys: [])
    ring = Keyring(tmp_path / "keys.json")
    with serving(ServerState(), keys=ring, console=True) as url, client_of(url) as client:
        for path in ("/", *(f"/console/{name}" for name in read_pages())):
            assert client.get(path).status_code == client.head(path).status_code == 200, path
        assert client.get("/console/../tasks").status_code == 401
        assert client.get("/console/nothing").status_code == 404
        assert client.post("/", json={"inputs": "a"}).status_code == 401
        assert client.get("/ops/stream").status_code == 401


def test_generating_at_the_root_goes_on(client: httpx.Client) -> None:
    answer = client.post("/", json={"inputs": "a"})
    assert answer.status_code == 503, "POST / is the generate route, which waits for the base model"
    assert answer.json()["error"]["code"] == "not_ready"


@pytest.mark.parametrize("console", [True, False])
def test_it_can_be_turned_off(console: bool) -> None:
    application: Any = asgi_app(Settings(console=console))

    async def ask() -> int:
        transport = httpx.ASGITransport(application)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as inside:
            return (await inside.get("/console/main.js")).status_code

    assert asyncio.run(ask()) == (200 if console else 404)


def test_turned_off_nothing_answers() -> None:
    with serving(ServerState()) as url, client_of(url) as client:
        assert client.get("/console/main.js").status_code == 404
        assert client.get("/").status_code == 405  # the path is POST's alone then
