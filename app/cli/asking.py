"""Items through a running server: a version that is pinned, or the base model, many requests at a time."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import typer

from app.cli.server import CommandFailed, NoAnswer, Row, ServerClient
from app.scoring.items import Item, Outcome
from app.scoring.labels import expected_label
from app.serving.publishing.task_settings import LabelledChoice, parse_choices
from app.store.references import DEFAULT_ALIAS
from app.text.template import Template, bind_inputs, joined

BASE = "(base model)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One version of a task, or the base model itself, and how it is asked."""

    reference: str | None  # pinned, so that an alias that moves meanwhile changes nothing
    name: str  # for people: `sentiment@3`
    digest: str | None
    template: Template | None = None  # rendered here, before the task's own
    parameters: Mapping[str, Any]
    choices: tuple[LabelledChoice, ...] = ()  # sent with a second request, which classifies

    def body(self, item: Item) -> Row:
        """Return the request that generates, greedily."""
        return self._body(item, {**self.parameters, "do_sample": False})

    def choice_body(self, item: Item) -> Row:
        """Return the request that classifies."""
        return self._body(item, {"choices": [choice.model_dump() for choice in self.choices]})

    def _body(self, item: Item, parameters: Row) -> Row:
        inputs: Any = item.inputs
        if self.template is not None:
            inputs = joined(self.template.render(bind_inputs(self.template, item.inputs)))
        task = {} if self.reference is None else {"task_id": self.reference}
        return {"inputs": inputs, "parameters": parameters} | task


@dataclass(frozen=True, slots=True)
class Version:
    """A version that a reference means now, and the task's last release (0: none)."""

    task_id: str
    alias: str | None  # that the reference names; None: it names the version itself
    row: Row
    release: int
    aliases: Mapping[str, Any]

    @property
    def number(self) -> int:
        """Of the version within its task."""
        return int(self.row["version"])

    @property
    def choices(self) -> tuple[LabelledChoice, ...]:
        """The task's labels, each with the text that is scored for it."""
        return tuple(parse_choices(self.row["choices"]))

    def asked(self, parameters: Row, template: Template | None = None) -> Asked:
        """Return the version as one that answers."""
        digest = self.row["version_digest"]
        return Asked(
            reference=f"{self.task_id}@{digest}",
            name=f"{self.task_id}@{self.number}",
            digest=digest,
            template=template,
            parameters=parameters,
        )


def base_asked(parameters: Row, template: Template | None = None) -> Asked:
    """Return the base model as one that answers."""
    return Asked(reference=None, name=BASE, digest=None, template=template, parameters=parameters)


def find_version(client: ServerClient, reference: str) -> Version:
    """Return the version that the reference means now: `task`, `task@alias`, `task@3`, `task@sha256:...`.

    Raise CommandFailed: there is no such task, alias or version, or the alias is several by weight.
    """
    task_id, _, selector = reference.partition("@")
    history = client.call("GET", f"/tasks/{task_id}")
    alias = None if selector.startswith("sha256:") or selector.isdecimal() else selector or DEFAULT_ALIAS
    wanted = selector if alias is None else _only_version(task_id, alias, history["aliases"])
    for row in history["versions"]:
        if wanted in (str(row["version"]), row["version_digest"]):
            release = max((release["number"] for release in history["releases"]), default=0)
            return Version(task_id, alias, row, release, history["aliases"])
    raise CommandFailed(f"task {task_id} has no version {wanted}; `promptplex show {task_id}` lists them")


def _only_version(task_id: str, alias: str, aliases: Mapping[str, Any]) -> str:
    if alias not in aliases:
        known = ", ".join(aliases) or "none"
        raise CommandFailed(f"task {task_id} has no alias {alias!r}; it has: {known}")
    meaning = aliases[alias]
    if isinstance(meaning, int):
        return str(meaning)
    raise CommandFailed(
        f"{task_id}@{alias} is several versions by weight; evaluate one of them: "
        + ", ".join(f"{task_id}@{version}" for version in meaning)
    )


def choice_names(choices: Sequence[LabelledChoice], items: Sequence[Item]) -> tuple[str, ...]:
    """Return the labels of choices, if every item expects one of them; else none."""
    names = tuple(choice.value for choice in choices)
    return names if len(names) > 1 and {expected_label(item) for item in items} <= set(names) else ()


def ask_all(
    client: ServerClient, sides: Sequence[Asked], items: Sequence[Item], concurrency: int, label: str
) -> list[list[Outcome]]:
    """Return the outcomes of each side, in the order of the items; a progress bar on stderr.

    The sides take turns, and many requests run at a time, so that the server can batch them. A refused
    request is an outcome. Raise NoAnswer where the server doesn't answer.
    """
    work = [(side, item) for item in items for side in sides]
    with (
        ThreadPoolExecutor(concurrency) as threads,
        typer.progressbar(length=len(work), label=label, file=typer.get_text_stream("stderr")) as bar,
    ):
        outcomes = []
        for outcome in threads.map(lambda pair: _ask(client, *pair), work):
            outcomes.append(outcome)
            bar.update(1)
    return [outcomes[number :: len(sides)] for number in range(len(sides))]


def _ask(client: ServerClient, side: Asked, item: Item) -> Outcome:
    try:
        text = client.call("POST", "/generate", json=side.body(item))["generated_text"]
        return Outcome(item, str(text), probabilities=_probabilities(client, side, item))
    except NoAnswer:
        raise
    except CommandFailed as refusal:
        return Outcome(item, "", error=str(refusal))


def _probabilities(client: ServerClient, side: Asked, item: Item) -> dict[str, float] | None:
    if not side.choices:
        return None
    answer = client.call("POST", "/generate", json=side.choice_body(item))
    return {each["value"]: each["probability"] for each in answer["choice"]["probabilities"]}
