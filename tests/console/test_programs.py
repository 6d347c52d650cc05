"""Programs in the console: steps, ballots, decisions, and what a task's page says of them."""

import json
import re
from typing import Any

import httpx2
import pytest
from playwright.sync_api import Page, expect

from tests.console.conftest import PATIENCE_MS, ROOT, serious_violations

expect.set_options(timeout=PATIENCE_MS)

ARITHMETIC = ROOT / "demo/prompts/arithmetic"
MARKERS = {"answer_after": "answer:", "steps_end": ";", "effort": {"low": 4, "high": 48}}
ASKED = "3 * (4 + 5)"
GROWTH = """() => {
    window.growth = [];
    new MutationObserver(() => {
        const count = document.querySelector('.answer').querySelectorAll('.steps li').length;
        if (count && count !== growth.at(-1)) growth.push(count);
    }).observe(document.querySelector('.answer'), {childList: true, subtree: true});
}"""


def publish(url: str, name: str, **task: Any) -> None:
    """A version of a task without tensors."""
    files = {"task": (None, json.dumps(task))}
    answer = httpx2.post(f"{url}/tasks/{name}/versions", files=files, trust_env=False, timeout=60)
    assert answer.status_code in (200, 201), answer.text


def post(url: str, path: str, body: dict[str, Any]) -> Any:
    answer = httpx2.post(f"{url}/{path}", json=body, trust_env=False, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture(scope="module")
def thinks(url: str) -> str:
    """The demo's arithmetic, with its steps apart from the answer."""
    files = {
        "prompt": (ARITHMETIC / "adapter_model.safetensors").read_bytes(),
        "config": (ARITHMETIC / "adapter_config.json").read_bytes(),
        "task": json.dumps({"template": "{text}\n", "reasoning": MARKERS}).encode(),
    }
    answer = httpx2.post(f"{url}/tasks/thinks/versions", files=files, trust_env=False, timeout=60)
    assert answer.status_code == 201, answer.text
    return "thinks"


def run(page: Page, text: str) -> None:
    page.get_by_label("Input").fill(text)
    page.get_by_role("button", name="Run").click()
    for timing in page.locator(".timing").all():
        expect(timing).to_have_text(re.compile(r"total"))


def code_of(page: Page) -> str:
    """The request as code for OpenAI's client, which runs."""
    page.get_by_text("Use it from code").first.click()
    page.get_by_role("button", name="OpenAI").first.click()
    return page.get_by_role("region", name="Code").first.inner_text()


def check_looks(page: Page) -> None:
    """Axe finds nothing serious in either scheme, and a phone scrolls down only."""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        assert serious_violations(page) == [], scheme
    page.set_viewport_size({"width": 375, "height": 720})
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 375


def test_steps_grow_apart_from_the_answer(
    page: Page, url: str, thinks: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(url, "turns", chain={"template": "{last}\n", "step_ends": ".", "done": "answer:", "max_steps": 3})
    page.goto(f"{url}/#/playground?task={thinks}&task=turns")
    expect(page.get_by_label("Thinking")).to_have_count(2)
    expect(page.get_by_label("Thinking").last).to_be_hidden()
    page.evaluate(GROWTH)
    run(page, ASKED)
    answer = page.locator(".answer").first
    expect(answer.locator(".steps li")).to_have_text(["4 + 5 = 9;", "3 * 9 = 27;"])
    expect(answer.locator(".said")).to_have_text("27")
    assert page.evaluate("() => growth") == [1, 2]
    expect(page.locator(".answer").last).to_have_text(
        re.compile("No answer: (a step repeated|the chain took)")
    )
    page.locator(".tokens").first.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".token-facts").first).to_have_text(re.compile("“4”"))
    check_looks(page)

    page.get_by_label("Thinking").first.select_option("low")
    run(page, ASKED)
    expect(answer.locator(".steps li")).to_have_text(["4 + 5"])
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    exec(code_of(page), {})
    printed = capsys.readouterr().out.split("\n")
    assert printed[0].strip() == "4 + 5"
    assert printed[1] == answer.locator(".said").inner_text()


def test_a_vote_shows_its_ballots(page: Page, url: str, thinks: str) -> None:
    page.goto(f"{url}/#/playground?task={thinks}")
    page.get_by_label("Ballots of a vote").fill("4")
    page.get_by_label("Next token").select_option("sample")
    page.get_by_label("Temperature").fill("2")
    page.get_by_label("Seed").fill("3")
    page.get_by_label("Maximum new tokens").fill("30")
    run(page, ASKED)
    drawn = {"max_new_tokens": 30, "do_sample": True, "temperature": 2, "seed": 3}
    body = {"task_id": thinks, "inputs": ASKED, "parameters": drawn | {"vote": {"n": 4}}}
    vote = post(url, "generate", body)["vote"]
    expect(page.locator(".votes-head")).to_have_text(
        f"4 ballots: the winner has {vote['share']:.0%} of the weight"
    )
    shown = [each["answer"] or "abstained" for each in vote["ballots"]]
    expect(page.locator(".ballots .said")).to_have_text([" ".join(each.split()) for each in shown])
    expect(page.locator(".votes .best")).to_have_text(re.compile(rf"{round(4 * vote['share'])} · "))
    page.locator(".ballots li summary").first.click()
    expect(page.locator(".ballots .steps").first.locator("li")).to_have_text(
        vote["ballots"][0]["reasoning"]["steps"]
    )
    check_looks(page)

    page.get_by_label("Maximum new tokens").fill("5")  # too few for an answer
    run(page, ASKED)
    expect(page.locator(".votes-head")).to_have_text("4 ballots, and all abstained")
    expect(page.locator(".bars .abstained")).to_have_text("abstained4 · 100%")
    expect(page.locator(".answer")).to_contain_text("No answer: all abstained.")


def test_versions_become_an_ensemble_and_are_named(page: Page, url: str) -> None:
    for question in ("Is this review positive or negative?", "Sentiment:"):
        publish(url, "jury", template=f"{question}\n{{text}}\n", choices=["positive", "negative"])
    page.goto(f"{url}/#/tasks/jury")
    live = page.get_by_role("form", name="Alias live")
    live.get_by_label("Points to").select_option("ensemble")
    live.get_by_label("Version 2, weight").fill("3")
    live.get_by_role("button", name="Move").click()
    expect(live.locator(".meaning")).to_have_text("versions 1 (weight 1), 2 (weight 3) together")
    expect(live.get_by_label("Version 2, weight")).to_have_value("3")

    page.get_by_role("link", name="Try it").click()
    run(page, "The food was wonderful.")
    members = page.locator(".ballots > ol > li")
    expect(members).to_have_count(2)
    expect(members.filter(has_text="version 2")).to_contain_text("weight 3")
    page.get_by_label("Mode", exact=True).select_option("choose")
    run(page, "The food was wonderful.")
    expect(page.locator(".timing")).to_contain_text("mean of 2 versions")
    expect(page.locator(".mass")).to_contain_text("Label mass")
    expect(members).to_have_count(2)


def test_decisions_are_bars_with_their_label_mass(
    page: Page, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page.goto(f"{url}/#/decisions?model=")
    expect(page.get_by_label("Question, or a statement")).to_have_count(2)
    page.get_by_label("Options").fill("food\n<img src=x onerror=alert(1)>: not an image\n")
    page.get_by_role("button", name="Add a question").click()
    page.get_by_label("Answer").last.select_option("score")
    page.get_by_label("Question, or a statement").last.fill("How good was it?")
    page.get_by_label("Levels, the lowest first").fill("bad\nfine\ngreat")
    page.keyboard.press("Control+Enter")
    cards = page.locator(".decision")
    expect(cards).to_have_count(3)
    body = {
        "model": "demo-causal",
        "input": page.get_by_label("Input").input_value(),
        "questions": [
            {
                "type": "choice",
                "instructions": "Which aspect does the review talk about?",
                "choices": [
                    {"value": "food"},
                    {"value": "<img src=x onerror=alert(1)>", "description": "not an image"},
                ],
            },
            {"type": "predicate", "instructions": "The review is positive."},
            {
                "type": "score",
                "instructions": "How good was it?",
                "levels": [{"label": "bad"}, {"label": "fine"}, {"label": "great"}],
            },
        ],
    }
    found = post(url, "v1/decisions", body)["answers"]
    expect(cards.first).to_contain_text(found[0]["choice"])
    expect(cards.nth(2).locator(".verdict")).to_contain_text(
        f"{found[2]['score']:.2f} on a scale from 0 to 2"
    )
    assert all(each["label_mass"] < 0.5 for each in found), (
        "a small base without a prompt goes on with its text"
    )
    expect(page.locator(".mass.low")).to_have_count(3)
    expect(cards.first).to_contain_text("the model wanted to say something else")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    exec(code_of(page), {})
    printed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert printed == ["choice", "predicate", "score"]
    check_looks(page)

    page.get_by_label("Model or task").select_option("review-aspect")
    expect(page.get_by_text("made for one question")).to_be_visible()


def test_the_task_made_for_one_question_answers_it(page: Page, url: str) -> None:
    labels = httpx2.get(f"{url}/tasks/review-aspect", trust_env=False).json()["versions"][0]["choices"]
    page.goto(f"{url}/#/tasks/review-aspect")
    page.get_by_role("link", name="Decide").click()
    page.get_by_label("Input").fill("The waiter was rude.")
    expect(page.get_by_label("Options")).to_have_value("\n".join(labels))
    expect(page.get_by_label("Question, or a statement")).to_be_hidden()
    page.get_by_role("button", name="Decide").click()
    expect(page.locator(".decision .verdict")).to_contain_text("service")
    expect(page.locator(".mass")).not_to_have_class(re.compile("low"))


def test_a_version_says_what_it_does_beyond_one_completion(page: Page, url: str) -> None:
    publish(
        url,
        "talks",
        template="Q: {text}\n",
        reasoning=MARKERS,
        vote={"n": 3},
        calibration={"temperature": 1.5},
        paraphrases=["Question: {text}\n", "Well, {text}\n"],
        few_shot=[{"inputs": "1 + 1", "output": "answer: 2"}],
        choices=["2", "3"],
    )
    publish(
        url, "talks", chain={"template": "{last}\n", "steps": [{"task": "sentiment"}], "max_step_tokens": 9}
    )
    page.goto(f"{url}/#/tasks/talks")
    facts = page.locator(".version > .facts")
    expect(facts.first).to_contain_text("A step ends where the model ends it; the last step is the answer.")
    expect(facts.first).to_contain_text("At most 8 steps, each of at most 9 tokens.")
    expect(facts.first.get_by_role("link", name="sentiment")).to_have_attribute("href", "#/tasks/sentiment")
    page.locator(".version > summary").last.click()
    for words in (
        'the answer stands behind "answer:", each step ends with ";".',
        "Tokens to think, by effort: low 4, high 48.",
        "3 samples of each answer",
        "divided by 1.5",
        "Well, {text}",
        "1 + 1 → answer: 2",
    ):
        expect(facts.last).to_contain_text(words)
    page.get_by_role("form", name="Alias live").get_by_label("Points to").select_option("spread-1")
    page.get_by_role("form", name="Alias live").get_by_role("button", name="Move").click()
    expect(
        page.get_by_text("live now points to version 1, its paraphrases spread over users.")
    ).to_be_visible()
    check_looks(page)
    page.goto(f"{url}/#/playground?task=talks")
    expect(page.get_by_label("Wording").locator("option")).to_have_count(3)
