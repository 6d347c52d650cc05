"""`GET /` and `/console/...`: the files of `static/`, read once, and nothing else.

They hold no data, so they are public even where keys are needed; what the page shows comes from the
API, under the key that its reader gives. It loads nothing from elsewhere and sets no cookie.
"""

import hashlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

_INDEX = "index.html"
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "cache-control": "no-cache",  # kept, but asked for again: an upgrade shows at once
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
_METHODS = ["GET", "HEAD"]

Endpoint = Callable[..., Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Page:
    """One file as it is sent."""

    content: bytes
    headers: dict[str, str]

    @property
    def etag(self) -> str:
        """Return the entity tag, which changes with the content."""
        return self.headers["etag"]


def read_pages() -> dict[str, Page]:
    """Read all files that may be sent, by their path below `static/`."""
    return {path: _page(path, file.read_bytes()) for path, file in _walk(files(__package__) / "static")}


def console_router(public: Callable[[Endpoint], Endpoint]) -> APIRouter:
    """Return the routes of the console, without `POST /`, which generates. `public` declares them open."""
    pages = read_pages()
    router = APIRouter(include_in_schema=False)

    @router.api_route("/", methods=_METHODS)
    @public
    async def index(request: Request) -> Response:
        return _answer(request, pages[_INDEX])

    @router.api_route("/console/{path:path}", methods=_METHODS)
    @public
    async def file(path: str, request: Request) -> Response:
        page = pages.get(path)
        if page is None:
            raise HTTPException(404)
        return _answer(request, page)

    return router


def _answer(request: Request, page: Page) -> Response:
    known = (tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(","))
    if page.etag in known:
        return Response(status_code=304, headers=page.headers)
    return Response(page.content, headers=page.headers)


def _page(path: str, content: bytes) -> Page:
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    media_type = _MEDIA_TYPES[path[path.rindex(".") :]]
    return Page(content, _HEADERS | {"content-type": media_type, "etag": etag})


def _walk(folder: Traversable, above: str = "") -> Iterator[tuple[str, Traversable]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _walk(entry, f"{above}{entry.name}/")
        elif any(entry.name.endswith(suffix) for suffix in _MEDIA_TYPES):
            yield above + entry.name, entry
