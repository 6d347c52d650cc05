"""Training in the console, in a real browser before a real server, with a run's process in miniature."""

import re
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from playwright.sync_api import Browser, Page, expect

from app.serving.training_runs.run_files import RunFiles
from app.store.prompt_store import open_store
from tests.api.server import hosted
from tests.console.conftest import PATIENCE_MS, opened_page, serious_violations
from tests.console.test_console import drop
from tests.serving.training_runs.runs import child_command

expect.set_options(timeout=PATIENCE_MS)

EXAMPLES = "".join(f'{{"text": "film {number}", "label": "{number % 2}"}}\n' for number in range(20)).encode()


# A page looks at a run every 0.1 s instead of every 2 s.
IMPATIENT = "const wait = setTimeout; window.setTimeout = (work, ms, ...more) => wait(work, ms / 20, ...more)"


class Plans:
    """What a run of a task does, and its gate."""

    def __init__(self, folder: Path, store: Path) -> None:
        self.folder = folder
        self._plans: dict[str, dict[str, object]] = {}
        digest = open_store(store).resolve("sentiment").prompt_digest
        self.prompt = str(store / f"blobs/{digest}.safetensors")

    def of(self, task_id: str, **plan: object) -> Path:
        """A run of the task reports, waits for the file that this returns, and ends."""
        gate = self.folder / f"{task_id}.gate"
        made = {"reports": True, "gate": str(gate), "prompt": self.prompt} | plan
        self._plans[task_id] = made
        return gate

    def command_of(self, run: RunFiles) -> list[str]:
        """Instead of `promptplex train`."""
        return child_command(self._plans[run.record.task_id], run.output)


@pytest.fixture(scope="module")
def plans(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Plans:
    return Plans(tmp_path_factory.mktemp("plans"), store)


@pytest.fixture(scope="module")
def url(browser: Browser, store: Path, plans: Plans) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("app.main.train_command", lambda *base, **more: plans.command_of)
        with hosted(dtype="float32", threads=1, store=store, training=True) as url:
            yield url


@pytest.fixture(scope="module")
def finished(browser: Browser, url: str, plans: Plans) -> str:
    """The place of a run that made a candidate of the task `seen`."""
    plans.of("seen").touch()
    with opened_page(browser) as watched:
        start(watched.page, url, "seen")
        expect(watched.page.get_by_role("button", name="Make it live")).to_be_visible()
        return str(watched.page.evaluate("location.hash"))


def start(page: Page, url: str, task_id: str) -> None:
    page.add_init_script(IMPATIENT)
    page.goto(f"{url}/#/train")
    drop(page, {"films.jsonl": EXAMPLES})
    page.get_by_label("Task", exact=True).fill(task_id)
    page.get_by_label("Task", exact=True).press("Tab")
    expect(page.locator(".report").first).to_contain_text("Read as text and label")
    page.get_by_role("button", name="Start training").click()
    expect(page.get_by_role("heading", level=1)).to_have_text(f"Training {task_id}")


def test_from_a_file_to_a_live_task(page: Page, url: str, plans: Plans) -> None:
    gate = plans.of("sentiment")
    page.add_init_script(IMPATIENT)
    page.goto(f"{url}/#/train")
    drop(page, {"films.jsonl": EXAMPLES, "README.md": b"# left out"})
    report = page.locator(".report").first
    expect(page.get_by_label("Task", exact=True)).to_have_value("films")
    expect(report).to_contain_text("Read as text and label")
    expect(report).to_contain_text("Labels: 0, 1")
    expect(report.get_by_role("row")).to_have_count(6)
    page.get_by_label("Task", exact=True).fill("sentiment")
    page.get_by_label("Steps").fill("4")
    page.get_by_role("button", name="Start training").click()

    status = page.get_by_role("status").filter(has_text=re.compile("step|queue|reading|It"))
    expect(status).to_have_text(re.compile("step 4 of 4"))
    expect(
        page.get_by_role("img", name=re.compile("^Loss: loss 1 at step 1, 0.25 at step 4"))
    ).to_be_visible()
    expect(page.get_by_role("img", name=re.compile("dev exact 0.75 at step 4"))).to_be_visible()
    expect(page.get_by_text("the loss still falls: try more steps")).to_be_visible()
    gate.touch()
    compared = page.locator(".comparison")
    expect(compared).to_contain_text("Live is version 1.")
    expect(compared.get_by_role("row", name=re.compile("^version 6 0.75$"))).to_be_visible()
    expect(page.get_by_role("row", name="trained prompt 0.75 0.4 to 0.93")).to_be_visible()
    compared.get_by_role("button", name="Make it live").click()
    expect(page.locator(".outcome")).to_contain_text("Version 6 is live.")
    expect(compared).to_contain_text("It answers requests for the task now.")
    history = httpx2.get(f"{url}/tasks/sentiment", trust_env=False).json()
    assert history["aliases"]["live"] == history["aliases"]["candidate"] == 6

    compared.get_by_role("link", name="The task").click()
    page.locator(".trained > summary").first.click()
    expect(page.locator(".trained").first.get_by_role("img").first).to_be_visible()


def test_examples_that_are_wrong_are_explained(browser: Browser, url: str) -> None:
    with opened_page(browser) as watched:
        page = watched.page
        page.goto(f"{url}/#/train?task=wrong")
        drop(page, {"films.jsonl": EXAMPLES + b'{"text": "a", "lable": "b"}\n'})
        expect(page.get_by_role("alert")).to_contain_text("data.jsonl, line 21")
        expect(page.get_by_role("alert")).to_contain_text("label")
        watched.errors.clear()  # Chromium reports 422


def test_a_run_is_cancelled_and_listed(page: Page, url: str, plans: Plans) -> None:
    plans.of("endless", reports=False)
    start(page, url, "endless")
    page.get_by_role("button", name="Cancel the run").click()
    expect(page.get_by_text("The run is cancelled.")).to_be_visible()
    page.get_by_role("link", name="← Train").click()
    expect(page.get_by_label("Training runs")).to_contain_text("cancelled")


def test_why_a_run_failed_is_shown(page: Page, url: str, plans: Plans) -> None:
    plans.of("failing", reports=False, error="data.jsonl, line 3: label is empty").touch()
    start(page, url, "failing")
    expect(page.get_by_role("alert")).to_contain_text("data.jsonl, line 3: label is empty")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser: Browser, url: str, finished: str, scheme: str) -> None:
    with opened_page(browser, color_scheme=scheme) as watched:
        page = watched.page
        for view in (finished, "#/train?task=seen", "#/tasks/seen"):
            page.goto(f"{url}/{view}")
            expect(page.locator("main .panel").first).to_be_visible()
            if view == finished:
                expect(page.get_by_role("button", name="Make it live")).to_be_visible()
            page.wait_for_load_state("networkidle")
            assert serious_violations(page) == [], view


def test_a_phone_scrolls_down_only(browser: Browser, url: str, finished: str) -> None:
    with opened_page(browser, viewport={"width": 375, "height": 720}) as watched:
        page = watched.page
        for view in (finished, "#/train?task=seen"):
            page.goto(f"{url}/{view}")
            if view == finished:
                expect(page.get_by_role("button", name="Make it live")).to_be_visible()
            page.wait_for_load_state("networkidle")
            assert page.evaluate("document.documentElement.scrollWidth") <= 375, view
