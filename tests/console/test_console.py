"""The console in a real browser, against a real server: seen as a person sees it, used as one uses it."""

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect
from safetensors.numpy import save

from app.keys.key import Key, Scope, hash_of, new_key_text
from app.keys.key_file import change_keys
from tests.api.server import hosted
from tests.console.conftest import PATIENCE_MS, ROOT, opened_page, serious_violations

expect.set_options(timeout=PATIENCE_MS)

SENTIMENT = ROOT / "demo/prompts/sentiment"
VIEWS = ("#/live", "#/tasks", "#/tasks/sentiment", "#/playground", "#/decisions")
REFUSED = "Failed to load resource: the server responded with a status of {}"  # Chromium's own words


@contextmanager
def load(url: str, key: str | None = None) -> Iterator[None]:
    """Two tasks and the base model, asked again and again while the block lasts."""
    over = threading.Event()
    headers = {"authorization": f"Bearer {key}"} if key else {}

    def ask(task: str | None) -> None:
        body = {"inputs": "name[The Eagle], food[Italian]", "parameters": {"max_new_tokens": 60}}
        with httpx2.Client(trust_env=False, timeout=60, headers=headers) as client:
            while not over.is_set():
                client.post(f"{url}/generate", json=body | ({"task_id": task} if task else {}))

    threads = [threading.Thread(target=ask, args=(task,)) for task in ("table-to-text", "arithmetic", None)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def wrong_width() -> bytes:
    return save({"prompt_embeddings": np.zeros((4, 100), np.float32)})


def drop(page: Page, files: dict[str, bytes]) -> None:
    """What a browser does when files are dropped on the zone."""
    given = [[name, base64.b64encode(data).decode()] for name, data in files.items()]
    transfer = page.evaluate_handle(
        """files => {
            const transfer = new DataTransfer();
            for (const [name, data] of files) {
                const bytes = Uint8Array.from(atob(data), character => character.charCodeAt(0));
                transfer.items.add(new File([bytes], name));
            }
            return transfer;
        }""",
        given,
    )
    for event in ("dragenter", "dragover", "drop"):
        page.dispatch_event(".drop", event, {"dataTransfer": transfer})


def test_live_lanes_move_under_load(page: Page, url: str) -> None:
    page.goto(f"{url}/#/live")
    expect(page.get_by_role("heading", name="Nothing is running")).to_be_visible()
    expect(page.get_by_text(f"curl {url}/generate")).to_be_visible()
    with load(url):
        lanes = page.locator(".lane-labels li")
        expect(lanes.filter(has_text="table-to-text v1").first).to_be_visible()
        expect(lanes.filter(has_text="base model").first).to_be_visible()
        expect(page.locator(".chips").get_by_role("link", name="table-to-text")).to_be_visible()
        expect(page.locator(".lanes canvas")).to_have_attribute("aria-label", re.compile("table-to-text"))
        first = picture(page)
        page.wait_for_function(
            "first => document.querySelector('.lanes canvas').toDataURL() !== first", arg=first
        )
        expect(stat(page, "Tokens per second")).to_have_text(re.compile(r"[1-9]"))
        expect(stat(page, "First token, p50")).to_have_text(re.compile(r"ms|s"))
        device = page.get_by_role("row", name=re.compile("^Device"))
        expect(device).to_have_text(re.compile(r"Device[1-9]"))  # a prompt is asked for again
        page.get_by_role("button", name="Pause").click()
        expect(page.get_by_role("button", name="Resume")).to_have_attribute("aria-pressed", "true")
        still = picture(page)
        page.wait_for_timeout(600)
        assert picture(page) == still, "paused means still"


def picture(page: Page) -> str:
    return str(page.evaluate("document.querySelector('.lanes canvas').toDataURL()"))


def stat(page: Page, name: str):  # type: ignore[no-untyped-def]
    return page.locator(".stats > div").filter(has_text=name).locator(".value")


def test_a_peft_prompt_dropped_becomes_a_version_and_answers(page: Page, url: str) -> None:
    page.goto(f"{url}/#/tasks")
    expect(page.get_by_role("row", name=re.compile("sentiment"))).to_be_visible()
    names = ("adapter_model.safetensors", "adapter_config.json", "task.json")
    drop(page, {"README.md": b"# ignored"} | {name: (SENTIMENT / name).read_bytes() for name in names})
    expect(page.locator(".files li")).to_have_count(4)
    page.get_by_label("Task", exact=True).fill("manner")
    page.get_by_role("button", name="Upload").click()
    report = page.locator(".report")
    expect(report).to_contain_text("manner version 1 is stored")
    expect(report).to_contain_text("3 of 3 examples gave the expected output")
    expect(page.get_by_role("row", name=re.compile("^manner soft prompt v1 16"))).to_be_visible()
    report.get_by_role("link", name="Try it").click()
    page.get_by_label("Input").fill("The food was wonderful.")
    page.get_by_role("button", name="Run").click()
    expect(page.locator(".answer")).to_have_text("positive")


def test_files_can_be_chosen_too(page: Page, url: str) -> None:
    page.goto(f"{url}/#/tasks")
    names = ("adapter_model.safetensors", "adapter_config.json")
    page.set_input_files("input[type=file]", [SENTIMENT / name for name in names])
    page.get_by_label("Task", exact=True).fill("chosen")
    page.get_by_label("Alias to move").fill("none")
    page.get_by_role("button", name="Upload").click()
    expect(page.locator(".report")).to_contain_text("No alias moved.")


def test_a_refused_upload_says_which_tensor_and_why(browser: Browser, url: str) -> None:
    with opened_page(browser) as watched:
        page = watched.page
        page.goto(f"{url}/#/tasks")
        drop(page, {"adapter_model.safetensors": wrong_width(), "adapter_config.json": config()})
        page.get_by_label("Task", exact=True).fill("too-narrow")
        page.get_by_role("button", name="Upload").click()
        report = page.locator(".report").get_by_role("alert")
        expect(report).to_contain_text("422 · prompt_rejected")
        facts = report.locator("dl")
        expect(facts).to_contain_text("prompt_embeddings")
        expect(facts).to_contain_text("256")
        expect(facts).to_contain_text("100")
        assert [error for error in watched.errors if not error.startswith(REFUSED.format(422))] == []
        watched.errors.clear()
        assert httpx2.get(f"{url}/tasks/too-narrow", trust_env=False).status_code == 404


def config() -> bytes:
    given = json.loads((SENTIMENT / "adapter_config.json").read_text())
    return json.dumps(given | {"num_virtual_tokens": 4}).encode()


def test_an_alias_is_moved_and_rolled_back(page: Page, url: str) -> None:
    for number in (1, 2):
        task = json.dumps({"template": f"{number}: {{text}}"})
        published = httpx2.post(
            f"{url}/tasks/moved/versions", files={"task": (None, task)}, trust_env=False, timeout=60
        )
        assert published.status_code == 201, published.text
    page.goto(f"{url}/#/tasks/moved")
    live = page.get_by_role("form", name="Alias live")
    expect(live.locator(".meaning")).to_have_text("version 2")
    live.get_by_label("Points to").select_option("1")
    live.get_by_label("Reason").fill("version 2 is worse on names")
    live.get_by_role("button", name="Move").click()
    expect(live.locator(".meaning")).to_have_text("version 1")
    history = page.locator(".timeline li")
    expect(history.first).to_contain_text("Release 3 live moved to version 1")
    expect(history.first).to_contain_text("version 2 is worse on names")

    live.get_by_label("Reason").fill("it was the test data")
    live.get_by_role("button", name="Roll back").click()
    expect(page.get_by_text("live is rolled back to version 2.")).to_be_visible()
    expect(history.first).to_contain_text("Release 4 live rolled back to version 2")
    expect(history.first).to_contain_text("it was the test data")

    live.get_by_label("Points to").select_option("split")
    live.get_by_label("Version 1, weight").fill("1")
    live.get_by_label("Version 2, weight").fill("3")
    live.get_by_role("button", name="Move").click()
    expect(live.locator(".meaning")).to_have_text("version 1: 25%, version 2: 75%")
    aliases = httpx2.get(f"{url}/tasks/moved", trust_env=False).json()["aliases"]
    assert aliases == {"live": {"1": 1, "2": 3}}


def test_a_task_is_retired_and_restored(page: Page, url: str) -> None:
    page.goto(f"{url}/#/tasks/date-us")
    page.get_by_role("button", name="Retire…").click()
    dialog = page.get_by_role("dialog", name="Retire date-us?")
    dialog.get_by_label("Why").fill("nobody asks")
    dialog.get_by_role("button", name="Retire").click()
    expect(page.get_by_text("date-us is retired.")).to_be_visible()
    expect(page.locator(".timeline li").first).to_contain_text("nobody asks")
    page.get_by_role("button", name="Restore").click()
    expect(page.get_by_text("date-us is served again.")).to_be_visible()


def test_four_columns_stream_side_by_side(page: Page, url: str) -> None:
    columns = ("sentiment", "intent@1", "review-aspect", "")
    page.goto(f"{url}/#/playground?{'&'.join(f'task={each}' for each in columns)}")
    answers = page.locator(".answer")
    expect(answers).to_have_count(4)
    expect(page.get_by_label("Input")).not_to_have_value("")  # an example, once all columns are there
    page.get_by_label("Input").fill("The waiter was rude.")
    page.get_by_role("button", name="Run").click()
    timings = page.locator(".timing")
    for number in range(4):
        expect(timings.nth(number)).to_have_text(
            re.compile(r"first token [\d.]+ m?s · total [\d.]+ m?s · \d+ tokens? .*(itself|reached)")
        )
    expect(answers.nth(0)).to_have_text("negative")
    expect(answers.nth(2)).to_have_text("service")
    expect(page.get_by_role("button", name="Add a column")).to_be_disabled()

    tokens = page.locator(".tokens").first
    tokens.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".token-facts").first).to_have_text(re.compile(r"“.+”: [\d.]+% \(log-probability"))
    page.locator(".token").last.hover()
    expect(page.locator(".token-facts").last).to_have_text(re.compile(r"token \d+"))


def test_labels_are_bars_and_requests_become_code(page: Page, url: str) -> None:
    page.goto(f"{url}/#/playground?task=sentiment&task=")
    page.get_by_label("Input").fill('It\'s cold and the soup "bad".')
    page.get_by_label("Mode", exact=True).select_option("choose")
    page.get_by_role("button", name="Run").click()
    expect(page.locator(".bars .best")).to_have_text(re.compile(r"negative[\d.]+%"))
    expect(page.locator(".answer").last).to_contain_text("no labels of its own")
    page.get_by_label("Labels", exact=True).fill("hot, cold")
    page.get_by_role("button", name="Run").click()
    expect(page.locator(".bars li")).to_have_count(4)

    page.get_by_label("Mode", exact=True).select_option("text")
    page.get_by_text("Use it from code").first.click()
    snippet = page.get_by_role("region", name="Code")
    expect(snippet).to_contain_text(f"curl {url}/generate")
    page.get_by_role("button", name="Python").click()
    body = re.search(r"body = (.*)", snippet.inner_text())
    assert body is not None
    assert eval(body[1]) == {"task_id": "sentiment", "inputs": 'It\'s cold and the soup "bad".'}
    page.get_by_role("button", name="OpenAI").click()
    compile(snippet.inner_text(), "snippet", "exec")


def test_named_fields_have_inputs_of_their_own(page: Page, url: str) -> None:
    template = "name: {name}, food: {food}\n"
    task = json.dumps({"template": template})
    httpx2.post(f"{url}/tasks/fields/versions", files={"task": (None, task)}, trust_env=False, timeout=60)
    page.goto(f"{url}/#/playground?task=fields")
    page.get_by_label("name", exact=True).fill("The Eagle")
    page.get_by_label("food", exact=True).fill("Italian")
    page.get_by_role("button", name="Run").click()
    expect(page.locator(".timing")).to_have_text(re.compile("first token"))


@pytest.fixture(scope="module")
def with_keys(browser: Browser, store: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A server that wants keys: its URL, and a key for each of two people."""
    path = store.parent / "keys.json"
    texts = {"ada": new_key_text(), "watcher": new_key_text()}
    scopes = {"ada": frozenset(Scope), "watcher": frozenset({Scope.METRICS})}
    change_keys(
        path,
        lambda _: [Key(name=name, sha256=hash_of(text), scopes=scopes[name]) for name, text in texts.items()],
    )
    with hosted(dtype="float32", threads=1, store=store, keys_file=path) as url:
        yield url, texts


def test_with_keys_nothing_is_readable_before_one_is_given(
    browser: Browser, with_keys: tuple[str, dict[str, str]]
) -> None:
    url, keys = with_keys
    with opened_page(browser) as watched:
        page = watched.page
        bodies: list[str] = []
        page.on(
            "response",
            lambda each: bodies.append(each.url) if each.ok and "/console/" not in each.url else None,
        )
        for view in VIEWS:
            page.goto(f"{url}/{view}")
            page.reload()
            expect(page.get_by_role("heading", name="This server needs a key")).to_be_visible()
            assert "sentiment" not in page.locator("body").inner_text()
            assert "demo-causal" not in page.locator("body").inner_text()
        assert {each.split("#")[0] for each in bodies} == {f"{url}/"}, "only the page itself was sent"
        page.get_by_label("Key").fill("ppx_" + "x" * 43)
        page.get_by_role("button", name="Open the console").click()
        expect(page.get_by_role("alert")).to_be_visible()
        page.get_by_label("Key").fill(keys["ada"])
        page.get_by_role("button", name="Open the console").click()
        page.get_by_role("link", name="Tasks", exact=True).click()
        expect(page.get_by_role("link", name="sentiment")).to_be_visible()
        page.goto(f"{url}/#/tasks/review-aspect")
        page.get_by_text("Another alias").click()
        page.get_by_label("Name").fill("canary")
        page.get_by_role("button", name="Add").click()
        expect(page.locator(".timeline li").first).to_contain_text("ada")
        stored = page.evaluate("[document.cookie, localStorage.length, location.href, sessionStorage.length]")
        assert stored[:2] == ["", 0]
        assert keys["ada"] not in stored[2]
        page.get_by_role("button", name="Key", exact=True).click()
        assert page.evaluate("sessionStorage.length") == 0
        assert all(error.startswith(REFUSED.format(401)) for error in watched.errors)
        watched.errors.clear()


def test_a_key_without_a_scope_is_told_so(browser: Browser, with_keys: tuple[str, dict[str, str]]) -> None:
    url, keys = with_keys
    with opened_page(browser) as watched:
        page = watched.page
        page.goto(url)
        page.get_by_label("Key").fill(keys["watcher"])
        page.get_by_role("button", name="Open the console").click()
        with load(url, keys["ada"]):
            expect(page.locator(".lane-labels li").filter(has_text="table-to-text").first).to_be_visible()
        page.get_by_role("link", name="Tasks", exact=True).click()
        expect(page.get_by_role("alert")).to_contain_text("needs a key with the scope")
        watched.errors.clear()  # Chromium reports 401 and 403


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser: Browser, url: str, scheme: str) -> None:
    with opened_page(browser, color_scheme=scheme) as watched, load(url):
        page = watched.page
        for view in VIEWS:
            page.goto(f"{url}/{view}")
            if view == "#/live":
                expect(page.locator(".lane-labels li[data-phase=decode]").first).to_be_visible()
            elif view == "#/playground":
                page.get_by_role("button", name="Run").click()
                expect(page.locator(".timing").last).to_have_text(re.compile("first token"))
            elif view == "#/decisions":
                page.get_by_role("button", name="Decide").click()
                expect(page.locator(".decision").first).to_be_visible()
            else:
                expect(page.get_by_role("heading", name=re.compile("^Upload"))).to_be_visible()
                expect(page.get_by_text("servable").first).to_be_visible()
            assert serious_violations(page) == [], view


def test_a_phone_scrolls_down_only(browser: Browser, url: str) -> None:
    with opened_page(browser, viewport={"width": 375, "height": 720}) as watched, load(url):
        page = watched.page
        for view in VIEWS:
            page.goto(f"{url}/{view}")
            expect(page.get_by_role("heading", level=1)).to_be_visible()
            page.wait_for_load_state("networkidle") if view != "#/live" else page.wait_for_timeout(800)
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= 375, view


def test_everything_is_reached_by_keyboard(page: Page, url: str) -> None:
    page.goto(f"{url}/#/tasks")
    expect(page.get_by_role("link", name="sentiment")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(page.get_by_role("searchbox")).to_be_focused()
    page.keyboard.type("senti")
    expect(page.get_by_role("status").filter(has_text="1 of")).to_be_visible()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the first column's head: sort the other way
    expect(page.get_by_role("columnheader", name="Task")).to_have_attribute("aria-sort", "descending")
    page.get_by_role("link", name="sentiment").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1, name="sentiment")).to_be_visible()
    expect(page.locator("main")).to_be_focused()
