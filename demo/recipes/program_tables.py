"""The figures of ``programs.json`` as the documents have them: lines of Markdown tables.

python -m demo.recipes.program_tables
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from demo.recipes.demos import DEMOS

Found = Mapping[str, Any]
EXPRESSIONS = {
    "three": "three operations, in forms that the corpus has",
    "three-new": "three, in forms that it doesn't have",
    "four": "four operations",
    "four-new": "four, in forms that no prompt was trained on",
}
_REFERENCES = {"1": "alone: soft prompt, 16", "2": "prefix, 16", "3": "p-tuning, 16"} | {
    "4": "soft prompt, 8",
    "5": "soft prompt, 32",
    "ensemble": "all five together",
}


def share(found: Found) -> str:
    """``283 of 300: 94.3% [91.1%, 96.4%]``."""
    low, high = found["interval_95"]
    return f"{found['count']} of {found['total']}: {found['share']:.1%} [{low:.1%}, {high:.1%}]"


def chains(found: Found) -> Iterator[str]:
    """One pass, one pass that was trained as the chain was, and the chain."""
    yield "| expressions | `arithmetic` | `arithmetic@deep` | `reduce`, a chain |"
    yield "|---|---|---|---|"
    for kind, sides in found.items():
        yield f"| {EXPRESSIONS[kind]} | {' | '.join(share(each) for each in sides.values())} |"


def votes(found: Found) -> Iterator[str]:
    """One greedy answer beside votes."""
    sizes = list(next(iter(found.values()))["votes"])
    ballots = [f"{n} ballot{'s' if n != '1' else ''}" for n in sizes]
    yield f"| task, expressions | greedy | {' | '.join(ballots)} |"
    yield f"|---|---|{'---|' * len(sizes)}"
    for name, each in found.items():
        task, kind = name.split(" on ")
        cells = [share(each["greedy"]), *(f"{each['votes'][n]['share']:.1%}" for n in sizes)]
        cells[1 + sizes.index("9")] = share(each["votes"]["9"])
        yield f"| `{task}`, {EXPRESSIONS[kind]} (temperature {each['temperature']}) | {' | '.join(cells)} |"


def ensembles(found: Found) -> Iterator[str]:
    """Versions beside their ensemble."""
    yield "| `sentiment` | generated | most probable label | calibration error | written by hand |"
    yield "|---|---|---|---|---|"
    for reference, own in found["sentiment"].items():
        by_hand = found["sentiment.handwritten"][reference]["generated"]
        name = _REFERENCES[reference.partition("@")[2]]
        cells = [share(own["generated"]), share(own["choices"]), f"{own['ece']:.3f}"]
        yield f"| {name} | {' | '.join(cells)} | {by_hand['count']} of {by_hand['total']} |"


def instructions(found: Found) -> Iterator[str]:
    """Phrasings, with and without worked examples."""
    yield "| phrasing | the instruction alone | with two worked examples |"
    yield "|---|---|---|"
    for phrasing, each in found.items():
        few = share(each["few-shot"]) if "few-shot" in each else "not measured"
        words = phrasing.replace("\n{text}\n", "").replace("\n", " ")
        yield f"| {words} | {share(each['zero-shot'])} | {few} |"


def decisions(found: Found) -> Iterator[str]:
    """Two questions by several models."""
    yield "| asked | question | right | mean label mass |"
    yield "|---|---|---|---|"
    for model, questions in found.items():
        for question, each in questions.items():
            yield f"| {model} | {question} | {share(each)} | {each['label_mass']:.3f} |"


_TABLES = {
    "chains": chains,
    "votes": votes,
    "ensembles": ensembles,
    "instructions": instructions,
    "decisions": decisions,
}


def tables(found: Found) -> dict[str, list[str]]:
    """The lines of all tables."""
    return {name: list(table(found[name])) for name, table in _TABLES.items()}


def main() -> None:
    """Print them."""
    found = json.loads((DEMOS["demo-causal"].path / "programs.json").read_text())
    print("\n\n".join("\n".join(lines) for lines in tables(found).values()))


if __name__ == "__main__":
    main()
