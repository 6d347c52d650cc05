"""A real browser in front of a real server on the demo; skipped where there is no chromium."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from tests.api.server import hosted
from tests.waiting import PATIENCE

ROOT = Path(__file__).parent.parent.parent
PATIENCE_MS = PATIENCE * 1000


@pytest.fixture(scope="package")
def chromium() -> str:
    """Its path."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs a chromium on the PATH (Debian's package `chromium`)")
    return path


@pytest.fixture(scope="module")  # Playwright's loop occupies the thread: no `asyncio.run` beside it
def browser(chromium: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="package")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the store that ships, to be changed."""
    copy = tmp_path_factory.mktemp("console") / "store"
    shutil.copytree(ROOT / "prompts_store", copy)
    return copy


@pytest.fixture(scope="package")
def url(chromium: str, store: Path) -> Iterator[str]:
    """The demo; asked for after the browser's path, so that nothing starts where there is none."""
    with hosted(dtype="float32", threads=1, store=store) as url:
        yield url


class Watched:
    """A page, and what went wrong on it."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.errors: list[str] = []
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)


@contextmanager
def opened_page(browser: Browser, **context: Any) -> Iterator[Watched]:
    """A page in a context of its own; an error that nobody expected fails the test."""
    inside = browser.new_context(**context)
    inside.set_default_timeout(PATIENCE_MS)
    watched = Watched(inside.new_page())
    try:
        yield watched
        assert watched.errors == []
    finally:
        inside.close()


def serious_violations(page: Page) -> list[tuple[str, list[str]]]:
    """What axe finds on a page, and in which elements."""
    return [
        (each["id"], [node["html"] for node in each["nodes"]])
        for each in Axe().run(page).response["violations"]
        if each["impact"] in ("serious", "critical")
    ]


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    with opened_page(browser) as watched:
        yield watched.page
