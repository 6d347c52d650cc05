"""The gate of `promptplex compare`: whether the alias moves to the candidate, and the move."""

from dataclasses import dataclass
from enum import StrEnum

from app.cli.asking import Version
from app.cli.server import CommandFailed, Row, ServerClient
from app.scoring.comparison import Difference
from app.store.references import DEFAULT_ALIAS


class Rule(StrEnum):
    """When the candidate takes the alias."""

    BETTER = "better"
    NOT_WORSE = "not-worse"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """A rule, and the alias that moves to the candidate if the task is as it was before the comparison."""

    rule: Rule
    margin: float
    candidate: Version
    alias: str

    def refusal(self, difference: Difference) -> str:
        """Return why the candidate doesn't take the alias; empty: it does."""
        if self.rule is Rule.BETTER:
            return difference.why_not_better()
        return difference.why_worse(self.margin)

    def promote(self, client: ServerClient, why: str) -> Row:
        """Move the alias by compare-and-set. Raise CommandFailed: another release came first, or no right."""
        path = f"/tasks/{self.candidate.task_id}/aliases/{self.alias}"
        body = {
            "version": self.candidate.number,
            "expected_release": self.candidate.release,
            "why": why[:1000],
        }
        try:
            return client.call("PUT", path, json=body)
        except CommandFailed as error:
            raise CommandFailed(f"nothing was promoted: {error.message}") from None


def gate_for(rule: Rule, margin: float, candidate: Version, other: Version | None) -> Gate:
    """Return the gate to the alias of the other side. Raise ValueError where there is none to move."""
    task_id = candidate.task_id
    if other is None:
        if DEFAULT_ALIAS in candidate.aliases:
            raise ValueError(
                f"{task_id}@{DEFAULT_ALIAS} exists, so a candidate must be compared with it before it takes "
                f"its place: promptplex compare {task_id}@{candidate.number} {task_id}@{DEFAULT_ALIAS}"
            )
        return Gate(rule=rule, margin=margin, candidate=candidate, alias=DEFAULT_ALIAS)
    if other.task_id != task_id or other.alias is None:
        raise ValueError(
            f"--promote-if moves the alias that the candidate is compared with: name one of task {task_id}, "
            f"such as {task_id}@{DEFAULT_ALIAS}"
        )
    if other.number == candidate.number:
        raise ValueError(
            f"{task_id}@{other.alias} is version {other.number}, the candidate, already; nothing to promote"
        )
    if other.release != candidate.release:
        raise CommandFailed(f"the aliases of task {task_id} are moving just now; try again")
    return Gate(rule=rule, margin=margin, candidate=candidate, alias=other.alias)
