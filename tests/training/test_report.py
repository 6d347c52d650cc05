"""The report of a run: complete, offline, and safe whatever the data holds."""

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from app.cli.training.outcome import flat_metrics
from app.scoring.measures import Score
from app.text.message import Message
from app.training.curves import Curve, curves_of
from app.training.examples import Example
from app.training.report.contents import AnsweredExample, Candidate, Report, TrialRow, metrics_json
from app.training.report.page import report_page
from app.training.run import DevRecord, History, StepRecord
from tests.scoring.outcomes import measure_texts

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</div></table></body></html><iframe src=//evil.example>",
    "</style><svg onload=alert(1)>",
    "]]><!--",
    "&lt;script&gt;",
    "a\x00b\x1bc\x85d",
    "lone \ud800 surrogate",
    "\u202egnitide",
    "$\\frac{1}{0}$",
    "x" * 100_000,
]


def scores(generated: list[str], expected: list[str]) -> dict[str, Score]:
    return measure_texts(generated, expected).scores()


def step(number: int) -> StepRecord:
    return StepRecord(
        step=number, loss=3.0 / number, learning_rate=0.01, grad_norm=1.0, num_tokens=200, seconds=0.1
    )


def look(number: int, exact: float) -> DevRecord:
    return DevRecord(step=number, loss=1.0, scores={"exact": exact}, is_best=exact == 0.75, seconds=0.5)


@pytest.fixture
def report() -> Report:
    expected = ["billing", "delivery", "returns", "delivery"]
    generated = ["billing", "delivery", "returns", "billing"]
    pairs = zip(expected, generated, strict=True)
    return Report(
        task="mails",
        base="demo-causal",
        base_fingerprint="0f" * 32,
        main_metric="exact",
        candidates=[
            Candidate(name="trained prompt", scores=scores(generated, expected)),
            Candidate(name="instruction", scores=scores(["billing"] * 4, expected), template="Sort: {text}"),
            Candidate(name="bare base", scores=scores(["?"] * 4, expected)),
        ],
        answered=[
            AnsweredExample(Example(inputs=f"mail {number}", output=right), given, right == given)
            for number, (right, given) in enumerate(pairs)
        ],
        settings={"method": "prefix", "learning_rate": 0.005, "init_text": None},
        template="Mail: {text}\nTeam:",
        data="mails.jsonl",
        data_sha256="ab" * 32,
        num_examples={"train": 160, "dev": 20, "test": 4},
        history=History(
            steps=tuple(step(number) for number in range(1, 31)),
            looks=(look(10, 0.5), look(20, 0.75), look(30, 0.7)),
            advice=("the loss has not moved",),
        ),
        best_step=20,
        seconds=61.5,
        trials=[
            TrialRow(settings={"learning_rate": 0.005}, steps=30, score=0.75, is_chosen=True),
            TrialRow(settings={"learning_rate": 0.001}, steps=10, score=0.25, is_chosen=False),
        ],
        code={"promptplex": "0.9"},
    )


class Page(HTMLParser):
    """The tags, the attributes and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.pieces: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attributes]

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.pieces).split())


def test_a_page_says_what_was_measured(report: Report) -> None:
    text = Page(report_page(report)).text
    assert "mails: a prompt trained on demo-causal" in text
    assert "exact 75.0% on 4 held-out examples; instruction: 25.0%" in text
    assert "Wrong answers: 1" in text
    assert "Right answers: 3" in text
    assert "mail 3 delivery billing" not in text  # cells are apart
    assert "30, of which step 20 was kept" in text
    assert "Sweep" in text


def test_a_result_without_a_test_set_is_not_called_one(report: Report) -> None:
    report = replace(report, measured_on="dev")
    text = Page(report_page(report)).text
    assert "exact 75.0% on 20 dev examples, by which the step was chosen; instruction: 25.0%" in text
    assert "held-out" not in text
    assert metrics_json(report)["test"] == {}
    assert flat_metrics(report)["dev exact"] == 0.75
    assert not [name for name in flat_metrics(report) if name.startswith("test")]


def test_a_page_needs_nothing_from_elsewhere(report: Report) -> None:
    written = report_page(report)
    page = Page(written)
    assert not {"script", "link", "img", "iframe", "object", "embed", "form", "base", "a"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "src"]
    links = [value for name, value in page.attributes if name in ("href", "xlink:href")]
    assert all(link.startswith("#") for link in links)
    assert "@import" not in written
    addresses = [value for name, value in page.attributes if "//" in value and not name.startswith("xmlns")]
    assert not addresses


def test_curves_are_well_formed_figures_with_ids_of_their_own(report: Report) -> None:
    written = report_page(report)
    figures = [part.split("</figure>")[0] for part in written.split("<figure>")[1:]]
    assert len(figures) == 2
    found = [
        {node.get("id") for node in ElementTree.fromstring(each).iter() if node.get("id")} for each in figures
    ]
    clips = [{name for name in each if name and not name[-1:].isdigit()} for each in found]
    assert all(found)
    assert not {name for name in clips[0] & clips[1] if name and name.startswith("p") and len(name) == 11}


def test_the_same_run_gives_the_same_bytes(report: Report) -> None:
    assert report_page(report) == report_page(replace(report))


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_data_stays_text(report: Report, text: str) -> None:
    report = replace(report, history=History(advice=("a line",)))
    plain = Page(report_page(report))
    chat = Example(messages=(Message(role="user", content=text),), output=text)
    fields = Example(inputs={"name": text}, output=text)
    written = report_page(
        replace(
            report,
            task=text,
            base=text,
            template=text,
            data=text,
            settings={"init_text": text},
            warnings=[text],
            history=replace(report.history, advice=(text,)),
            notes=[text],
            trials=[TrialRow(settings={"init_text": text}, steps=1, score=0.5, is_chosen=True)],
            candidates=[replace(each, name=text, template=text) for each in report.candidates],
            answered=[AnsweredExample(each, text, False) for each in (chat, fields)],
        )
    )
    page = Page(written)
    assert set(page.tags) == set(plain.tags)
    assert {name for name, _ in page.attributes} == {name for name, _ in plain.attributes}
    assert written.encode().decode() == written
    assert len(written) < len(report_page(report)) + 20_000
    if len(text) < 600 and text.isprintable():
        assert "".join(text.split()) in "".join(page.text.split())


def test_metrics_are_json_for_programs(report: Report) -> None:
    found: dict[str, Any] = json.loads(json.dumps(metrics_json(report), allow_nan=False))
    assert found["test"]["trained prompt"]["exact"]["share"] == 0.75
    assert list(found["test"]) == ["trained prompt", "instruction", "bare base"]
    assert found["main_metric"] == "exact"
    assert found["best_step"] == 20
    assert found["tokens_per_second"] == 2000.0
    assert [look["exact"] for look in found["dev"]] == [0.5, 0.75, 0.7]


def test_a_run_without_looks_or_steps_has_a_page_too(report: Report) -> None:
    assert "exact" in report_page(replace(report, history=History(), trials=[], answered=[]))


def test_curves_are_thinned_to_means_of_stretches(report: Report) -> None:
    curve = Curve(list(range(1, 1001)), [float(number) for number in range(1, 1001)]).thinned(200)
    assert len(curve.steps) == 200
    assert (curve.steps[0], curve.values[0]) == (5, 3.0)
    assert curve.steps[-1] == 1000
    assert Curve([1], [2.0]).thinned(200) == Curve([1], [2.0])
    assert Curve([], []).thinned(200) == Curve([], [])
    assert list(curves_of(report.history)) == ["loss", "dev loss", "dev exact"]
