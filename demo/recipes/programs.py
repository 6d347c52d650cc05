"""Measure what programs gain over one completion, as users see it: ``demo/demo-causal/programs.json``.

    python -m demo.recipes.programs demo-causal
    python -m demo.recipes.programs demo-causal votes

Chains beside one pass, votes beside one greedy answer, an ensemble beside its versions, instructions in
several phrasings with and without worked examples, and decisions: 300 held-out inputs each, through a
running server in float32. All shares have 95% intervals (Wilson).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2

from app.scoring.calibration import Calibration
from app.scoring.items import Item, Outcome
from app.scoring.shares import Share
from app.store.prompt_store import open_store
from app.store.traffic_split import versions_of
from demo.recipes import heldout
from demo.recipes.demos import DEMOS, Demo
from demo.recipes.measure import running_server
from demo.recipes.more import ALIAS, ASK, ONE_PASS_ALIAS
from demo.recipes.plots import plot_votes
from demo.recipes.reviews import ASPECTS, SENTIMENTS, aspect_review
from demo.recipes.splits import Example, Split, distinct
from demo.recipes.tasks import TEXT_ONLY, Task, learned, template

_AT_ONCE = 16
_DEV_SEED = 555
_NUM_DEV = 60  # of the split that prompts were trained on; they choose a temperature, and nothing else
_TEMPERATURES = (0.3, 0.6, 1.0)
_BALLOTS = (1, 3, 5, 9)
_NUM_BALLOTS = 9
_UNKNOWN = "Please label the following text with its polarity."  # a phrasing like none of the corpus
_PLOT = Path("docs/images/votes.svg")
_SOLVERS = {
    "one pass": "arithmetic",
    "one pass, trained alike": f"arithmetic@{ONE_PASS_ALIAS}",
    "chain": "reduce",
}
_QUESTIONS = {
    "sentiment": ("Is this review positive or negative?", SENTIMENTS),
    "aspect": ("Which aspect does the review talk about?", ASPECTS),
}

Row = dict[str, Any]
Json = dict[str, Any]


class Served:
    """A running server."""

    def __init__(self, url: str) -> None:
        self._client = httpx2.Client(base_url=url, trust_env=False, timeout=600)

    def post(self, route: str, bodies: Iterable[Json]) -> list[Json]:
        """The answers, in order."""

        def one(body: Json) -> Json:
            answer = self._client.post(route, json=body)
            answer.raise_for_status()
            found: Json = answer.json()
            return found

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(one, bodies))

    def answers(self, task: str | None, rows: Sequence[Row], **parameters: Any) -> list[Json]:
        """What a task, or the base, answers to each row."""
        named = {} if task is None else {"task_id": task}
        return self.post(
            "/generate", ({**named, "inputs": row["inputs"], "parameters": parameters} for row in rows)
        )


def rows_of(name: str) -> list[Row]:
    """A held-out file."""
    return [json.loads(line) for line in (heldout.HELDOUT / f"{name}.jsonl").read_text().splitlines()]


def share(texts: Iterable[str], rows: Sequence[Row]) -> Json:
    """How many are what is expected."""
    return Share(count(texts, rows), len(rows)).as_json()


def count(texts: Iterable[str], rows: Sequence[Row]) -> int:
    """How many texts are what is expected."""
    return sum(text.strip() == row["expected"] for text, row in zip(texts, rows, strict=True))


def texts_of(answers: Iterable[Json]) -> list[str]:
    """What was generated."""
    return [str(answer["generated_text"]) for answer in answers]


# -- chains ---------------------------------------------------------------------------------


def chains(served: Served, _: Demo) -> Json:
    """One pass with steps, one whose prompt was trained as the chain's was, and a chain."""
    return {
        kind: {label: _with_cost(served.answers(task, rows), rows) for label, task in _SOLVERS.items()}
        for kind in learned("reduce").also
        for rows in [rows_of(f"reduce.{kind}")]
    }


def _with_cost(answers: Sequence[Json], rows: Sequence[Row]) -> Json:
    details = [answer["details"] for answer in answers]
    ends: dict[str, int] = defaultdict(int)
    for each in details:
        ends[each["finish_reason"]] += 1
    tokens = statistics.fmean(each["generated_tokens"] for each in details)
    return {**share(texts_of(answers), rows), "tokens": round(tokens, 1), "ends": dict(ends)}


# -- votes ----------------------------------------------------------------------------------


def votes(served: Served, _: Demo) -> Json:
    """Greedy, and self-consistency by the number of ballots."""
    return {
        f"{task} on {kind}": _vote(served, task, kind)
        for task, kind in (("arithmetic", "three"), ("reduce", "four"))
    }


def _vote(served: Served, task: str, kind: str) -> Json:
    dev = [_row(example) for example in _dev(kind)]
    by_temperature = {}
    for temperature in _TEMPERATURES:
        voted = served.answers(task, dev, vote={"n": _NUM_BALLOTS}, temperature=temperature, seed=1)
        by_temperature[temperature] = count(texts_of(voted), dev)
    best = max(_TEMPERATURES, key=by_temperature.__getitem__)
    rows = rows_of(f"reduce.{kind}")
    cast = [
        answer["vote"]["ballots"]
        for answer in served.answers(task, rows, vote={"n": max(_BALLOTS)}, temperature=best, seed=1)
    ]
    return {
        "temperature": best,
        "dev": {str(temperature): found for temperature, found in by_temperature.items()},
        "greedy": share(texts_of(served.answers(task, rows)), rows),
        "votes": {str(n): share([winner(ballots[:n]) for ballots in cast], rows) for n in _BALLOTS},
    }


def winner(ballots: Sequence[Mapping[str, Any]]) -> str:
    """The most frequent answer, of equally frequent ones the earliest; an empty one abstains."""
    counts: dict[str, int] = defaultdict(int)
    for ballot in ballots:
        if ballot["answer"]:
            counts[ballot["answer"]] += 1
    return max(counts, key=counts.__getitem__, default="")


def _dev(kind: str) -> list[Example]:
    return distinct(learned("reduce").also[kind], Split.PROMPT, _NUM_DEV, _DEV_SEED)


def _row(example: Example) -> Row:
    return heldout.row(learned("reduce"), example)


# -- ensembles ------------------------------------------------------------------------------


def ensembles(served: Served, demo: Demo) -> Json:
    """Each version alone, the majority of their answers, and the mean of their probabilities."""
    target = open_store(demo.store).history("sentiment").aliases[ALIAS]
    references = [f"sentiment@{each}" for each in (*versions_of(target), ALIAS)]
    files = ("sentiment", "sentiment.handwritten")
    return {name: {each: _labels(served, each, rows_of(name)) for each in references} for name in files}


def _labels(served: Served, task: str, rows: Sequence[Row]) -> Json:
    """What is generated, and which label is the most probable."""
    said = share(texts_of(served.answers(task, rows)), rows)
    chosen = [answer["choice"] for answer in served.answers(task, rows, choices=list(SENTIMENTS))]
    outcomes = [
        Outcome(
            Item(inputs=row["inputs"], expected=row["expected"], answer=row["expected"]),
            choice["value"],
            probabilities={each["value"]: each["probability"] for each in choice["probabilities"]},
        )
        for choice, row in zip(chosen, rows, strict=True)
    ]
    errors = Calibration.of(outcomes).as_json()
    return {
        "generated": said,
        "choices": share([choice["value"] for choice in chosen], rows),
        "ece": errors["ece_equal_width"],
    }


# -- instructions ---------------------------------------------------------------------------


def instructions(served: Served, _: Demo) -> Json:
    """Each phrasing with the task's worked examples, and the same text without them on the base."""
    (task,) = (each for each in TEXT_ONLY if each.name == "mood")
    rows = rows_of(task.name)
    options = "\n".join(f"- {choice}" for choice in task.choices)
    phrasings: list[str] = [template(task), *task.program["paraphrases"]]
    found: dict[str, Json] = {}
    for number, phrasing in enumerate(phrasings):
        picked = {} if number == 0 else {"paraphrase": number - 1}
        found[phrasing] = {
            "zero-shot": _zero_shot(served, task, phrasing.replace("{options}", options), rows),
            "few-shot": share(texts_of(served.answers(task.name, rows, **picked)), rows),
        }
    found[_UNKNOWN] = {"zero-shot": _zero_shot(served, task, f"{_UNKNOWN}\n{{text}}\n", rows)}
    return found


def _zero_shot(served: Served, task: Task, phrasing: str, rows: Sequence[Row]) -> Json:
    asked = [{**row, "inputs": phrasing.replace("{text}", row["inputs"])} for row in rows]
    return share(texts_of(served.answers(None, asked, max_new_tokens=task.max_new_tokens)), rows)


# -- decisions ------------------------------------------------------------------------------


def decisions(served: Served, demo: Demo) -> Json:
    """Two questions about each of 300 reviews: to the base, to a task for any, to tasks of their own."""
    drawn = distinct(aspect_review, Split.HELDOUT, heldout.COUNT, 99)
    asked = {name: _question(name, instruction) for name, (instruction, _) in _QUESTIONS.items()}
    found = {
        f"base, {demo.path.name}": _decided(served, demo.path.name, list(asked.values()), drawn),
        f"task {ASK}": _decided(served, ASK, list(asked.values()), drawn),
    }
    for name, task in (("sentiment", "sentiment"), ("aspect", "review-aspect")):
        found[f"task {task}"] = _decided(served, task, [_question(name, "")], drawn)
    return found


def _question(name: str, instruction: str) -> Json:
    choices = [{"value": value} for value in _QUESTIONS[name][1]]
    return {"type": "choice", "name": name, "instructions": instruction, "choices": choices}


def _decided(served: Served, model: str, questions: Sequence[Json], drawn: Sequence[Example]) -> Json:
    bodies = ({"model": model, "input": each.text, "questions": list(questions)} for each in drawn)
    answers = [answer["answers"] for answer in served.post("/v1/decisions", bodies)]
    found = {}
    for place, question in enumerate(questions):
        own = [each[place] for each in answers]
        right = sum(a["choice"] == e.answers[question["name"]] for a, e in zip(own, drawn, strict=True))
        found[question["name"]] = {
            **Share(right, len(drawn)).as_json(),
            "label_mass": round(statistics.fmean(each["label_mass"] for each in own), 4),
        }
    return found


_SECTIONS: dict[str, Callable[[Served, Demo], Json]] = {
    "chains": chains,
    "votes": votes,
    "ensembles": ensembles,
    "instructions": instructions,
    "decisions": decisions,
}


def measure(demo: Demo, names: Iterable[str]) -> Json:
    """These sections."""
    work = demo.work / "programs"
    work.mkdir(parents=True, exist_ok=True)
    with running_server(demo.path, demo.store, work / "server.log") as url:
        served = Served(url)
        return {name: _SECTIONS[name](served, demo) for name in names}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("demo", choices=["demo-causal"])
    parser.add_argument("sections", nargs="*", metavar="section", help="default: all of them")
    arguments = parser.parse_args()
    demo = DEMOS[arguments.demo]
    target = demo.path / "programs.json"
    kept = json.loads(target.read_text()) if arguments.sections and target.exists() else {}
    found = kept | measure(demo, arguments.sections or _SECTIONS)
    target.write_text(json.dumps({name: found[name] for name in _SECTIONS if name in found}, indent=2) + "\n")
    if "votes" in found:
        plot_votes(found["votes"], _PLOT)


if __name__ == "__main__":
    main()
