"""What a comparison of two sides found: a table for people, JSON for programs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from app.cli.asking import Asked, sha256_of
from app.cli.tasks import print_table
from app.scoring.calibration import most_probable
from app.scoring.comparison import Difference
from app.scoring.items import Outcome
from app.scoring.score_words import amount, signed, title
from app.scoring.texts import token_f1

_SHOWN_CHARS = 200  # of a text in an example


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonReport:
    """Both sides' outcomes, line by line, and the differences over the lines that both answered."""

    asked: tuple[Asked, Asked]  # the candidate first
    data: Path
    pairs: Sequence[tuple[Outcome, Outcome]]
    differences: Mapping[str, Difference]
    main: str  # the metric that decides
    notes: tuple[str, ...]

    @property
    def num_refused(self) -> int:
        """How many requests the server refused, of both sides."""
        return sum(outcome.error is not None for pair in self.pairs for outcome in pair)

    @property
    def _answered(self) -> list[tuple[Outcome, Outcome]]:
        return [pair for pair in self.pairs if not (pair[0].error or pair[1].error)]

    @property
    def _names(self) -> tuple[str, str]:
        mine, theirs = self.asked
        return mine.name, theirs.name

    def in_words(self) -> str:
        """Return the difference that decides, in a line for the task's history."""
        found, (mine, theirs) = self.differences[self.main], self._names
        return (
            f"{title(self.main)} {amount(self.main, found.first.value)} of {mine} against "
            f"{amount(self.main, found.second.value)} of {theirs}, difference {_difference(found)} on "
            f"{len(self._answered)} lines of {self.data.name}"
        )

    def show(self, num_examples: int) -> None:
        """Print the table, the examples that differ most, and refusals."""
        mine, theirs = self._names
        typer.echo(f"{mine} against {theirs} on {self.data}: {len(self._answered)} lines")
        head = ("metric", mine, theirs, "difference, 95% interval", "McNemar")
        print_table(head, *map(self._row, self.differences.values()))
        typer.echo(f"* decides (--metric). {_signatures(self.differences)}".rstrip())
        self._show_examples(num_examples)
        for note in self.notes:
            typer.echo(note, err=True)
        self._show_refusals()

    def _row(self, found: Difference) -> tuple[str, ...]:
        name = found.first.name
        p = "" if found.pairs is None else _probability(found.pairs.p_value())
        values = (amount(name, metric.value) for metric in (found.first, found.second))
        return (title(name) + (" *" if name == self.main else ""), *values, _difference(found), p)

    def _show_examples(self, count: int) -> None:
        differing = [pair for pair in self._answered if _answer(pair[0]) != _answer(pair[1])]
        typer.echo(f"{len(differing)} of {len(self._answered)} answers differ" + (":" if differing else ""))
        for mine, theirs in sorted(differing, key=_distance, reverse=True)[:count]:
            names, item = ("inputs", "expected", *self._names), mine.item
            texts = (item.inputs, item.expected, _answer(mine), _answer(theirs))
            typer.echo("")
            print_table(
                *((f"  {name}", _shortened(repr(text))) for name, text in zip(names, texts, strict=True))
            )

    def _show_refusals(self) -> None:
        for side, outcomes in zip(self.asked, zip(*self.pairs, strict=True), strict=True):
            errors = [outcome.error for outcome in outcomes if outcome.error]
            if errors:
                typer.echo(
                    f"{len(errors)} requests to {side.name} were refused; those lines are left out of the "
                    f"comparison; the first: {errors[0]}",
                    err=True,
                )

    def as_json(self) -> dict[str, Any]:
        """Return both sides, the differences and every line."""
        mine, theirs = self.asked
        return {
            "candidate": {"name": mine.name, "version_digest": mine.digest},
            "against": {"name": theirs.name, "version_digest": theirs.digest},
            "data": self.data.name,
            "data_sha256": sha256_of(self.data),
            "lines": len(self.pairs),
            "compared": len(self._answered),
            "refused": self.num_refused,
            "main": self.main,
            "differences": {name: found.as_json() for name, found in self.differences.items()},
            "outputs": [_output(*pair) for pair in self.pairs],
        }


def _difference(found: Difference) -> str:
    name = found.first.name
    low, high = (signed(name, bound) for bound in found.interval)
    return f"{signed(name, found.value)} [{low}, {high}]"


def _probability(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _signatures(differences: Mapping[str, Difference]) -> str:
    return "; ".join(
        dict.fromkeys(each.first.signature for each in differences.values() if each.first.signature)
    )


def _answer(outcome: Outcome) -> str:
    return most_probable(outcome.probabilities) if outcome.probabilities else outcome.generated.strip()


def _distance(pair: tuple[Outcome, Outcome]) -> float:
    """Return how much nearer to the expected text one side's words are."""
    mine, theirs = (token_f1(_answer(outcome), outcome.item.expected) for outcome in pair)
    return abs(mine - theirs)


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 3] + "..."


def _output(mine: Outcome, theirs: Outcome) -> dict[str, Any]:
    line: dict[str, Any] = {"inputs": mine.item.inputs, "expected": mine.item.expected}
    for name, outcome in (("candidate", mine), ("against", theirs)):
        line[name] = outcome.generated if outcome.error is None else {"error": outcome.error}
        if outcome.probabilities is not None:
            line[f"{name}_probabilities"] = outcome.probabilities
    return line
