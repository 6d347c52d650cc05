"""Items through a running server: a version that is pinned, or the base model, many requests at a time."""

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer

from app.cli.server import CommandFailed, NoAnswer, Row, ServerClient
from app.scoring.items import Item, Outcome
from app.scoring.labels import expected_label
from app.serving.program_settings import ProgramSettings
from app.serving.publishing.task_settings import LabelledChoice, completion_part, parse_choices
from app.store.references import DEFAULT_ALIAS
from app.text.template import Template, bind_inputs, joined
from app.training.readers import read_examples

BASE = "(base model)"
NO_CHOICE = "a line expects what is none of the task's choices, so their probabilities are not scored"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One version of a task, or the base model itself, and how it is asked."""

    reference: str | None  # pinned, so that an alias that moves meanwhile changes nothing; None: the base
    model: str  # the same, as chats name it
    name: str  # for people: `sentiment@3`
    digest: str | None
    template: Template | None = None  # rendered here, before the task's own
    parameters: Mapping[str, Any]
    choices: tuple[LabelledChoice, ...] = ()  # sent with a second request, which classifies
    num_ballots: int | None = None  # that each request asks for; None: the task's own, if it votes
    has_vote: bool = False  # whether the task votes unless it is asked otherwise
    answer_after: str | None = None  # what steps end with; None: the whole output is the answer

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the names of the choices."""
        return tuple(choice.value for choice in self.choices)

    def said(self, client: ServerClient, item: Item, number: int) -> tuple[str, tuple[str, ...]]:
        """Generate, greedily or by a vote with the line's number as seed; return the answer and the ballots.

        Of a task with reasoning or a chain the answer is what comes after the steps.
        """
        if not isinstance(item.inputs, str | Mapping):
            body = {"model": self.model, "messages": item.inputs, **_of_chats(self.parameters)}
            choosing = {"seed": number} if self.is_voted else {"temperature": 0}
            answer = client.call("POST", "/v1/chat/completions", json=body | choosing)
            return str(answer["choices"][0]["message"]["content"]), ()
        vote = {} if self.num_ballots is None else {"vote": {"n": self.num_ballots}}
        choosing = {"seed": number} if self.is_voted else {"do_sample": False}
        parameters = {**self.parameters, **choosing, **vote}
        answer = client.call("POST", "/generate", json=self._body(item.inputs, parameters))
        ballots = answer["vote"]["ballots"] if self.is_voted else []
        return str(answer["generated_text"]), tuple(each["answer"] for each in ballots)

    @property
    def is_voted(self) -> bool:
        """Return whether answers are drawn and voted on."""
        return self.num_ballots != 1 if self.num_ballots is not None else self.has_vote

    def with_answer(self, item: Item) -> Item:
        """Return the item as its answer alone, where that is all that is generated."""
        if self.answer_after is None:
            return item
        answer = item.answer or item.expected.rpartition(self.answer_after)[2]
        return replace(item, expected=answer.strip())

    def probabilities(self, client: ServerClient, item: Item) -> dict[str, float] | None:
        """Classify, where there are choices."""
        if not self.choices or not isinstance(item.inputs, str | Mapping):
            return None
        parameters = {"choices": [choice.model_dump() for choice in self.choices]}
        answer = client.call("POST", "/generate", json=self._body(item.inputs, parameters))
        return {each["value"]: each["probability"] for each in answer["choice"]["probabilities"]}

    def _body(self, inputs: str | Mapping[str, str], parameters: Row) -> Row:
        if self.template is not None:
            inputs = joined(self.template.render(bind_inputs(self.template, inputs)))
        task = {} if self.reference is None else {"task_id": self.reference}
        return {"inputs": inputs, "parameters": parameters} | task


def _of_chats(parameters: Row) -> Row:
    """Return the parameters of an evaluation under the names of chats."""
    return {{"max_new_tokens": "max_tokens"}.get(name, name): value for name, value in parameters.items()}


def read_items(data: Path, limit: int | None) -> list[Item]:
    """Return the lines of a held-out file, which the training reader reads. Raise InvalidRequest."""
    return [example.item for example in read_examples(data)[:limit]]


def sha256_of(data: Path) -> str:
    """Return the digest of a file, in hex."""
    return hashlib.sha256(data.read_bytes()).hexdigest()


def check_directory(*paths: Path | None) -> None:
    """Raise ValueError where a file that is written at the end would have no directory."""
    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{path}: there is no directory {path.parent}; make it first")


def is_chat(items: Sequence[Item]) -> bool:
    """Return whether the items are chats; all items of a file have one form."""
    return not isinstance(items[0].inputs, str | Mapping)


@dataclass(frozen=True, slots=True)
class Version:
    """A version that a reference means now, and the task's last release (0: none)."""

    task_id: str
    alias: str | None  # that the reference names; None: it names the version itself
    row: Row
    release: int
    aliases: Mapping[str, Any]
    is_ensemble: bool = False  # the alias means several versions at once; `row` is the first one's

    @property
    def number(self) -> int:
        """Of the version within its task."""
        return int(self.row["version"])

    def was_trained_on(self, data: Path) -> bool:
        """Return whether its provenance names this very file, part of which was trained on."""
        training = self.row["provenance"].get("training") or {}
        return training.get("data_sha256") == sha256_of(data)

    @property
    def choices(self) -> list[LabelledChoice]:
        """The task's labels, each with the text that is scored for it."""
        return parse_choices(self.row["choices"])

    @property
    def completion_part(self) -> Row:
        """The task part of one of its completions, for the base model alone."""
        names = ("template", "defaults", "choices", *ProgramSettings.model_fields)
        return completion_part({name: self.row.get(name) for name in names})

    def asked(self, parameters: Row, template: Template | None = None) -> Asked:
        """Return the version as one that answers."""
        digest = None if self.is_ensemble else self.row["version_digest"]
        reference = f"{self.task_id}@{digest or self.alias}"
        return Asked(
            reference=reference,
            model=reference,
            name=f"{self.task_id}@{self.alias if self.is_ensemble else self.number}",
            digest=digest,
            template=template,
            parameters=parameters,
            has_vote=bool(self.row["vote"]),
            answer_after=self._marker,
        )

    @property
    def _marker(self) -> str | None:
        reasoning, chain = self.row["reasoning"] or {}, self.row["chain"] or {}
        return reasoning.get("answer_after") or chain.get("done")

    @property
    def temperature(self) -> float:
        """Return what the version's calibration divides log-probabilities by."""
        return float((self.row["calibration"] or {}).get("temperature", 1))


def base_asked(client: ServerClient, parameters: Row, template: Template | None = None) -> Asked:
    """Return the base model as one that answers."""
    model = str(client.call("GET", "/health").get("model"))
    return Asked(
        reference=None, model=model, name=BASE, digest=None, template=template, parameters=parameters
    )


def find_version(client: ServerClient, reference: str, *, or_ensemble: bool = False) -> Version:
    """Return the version that the reference means now: `task`, `task@alias`, `task@3`, `task@sha256:...`.

    Raise CommandFailed: there is no such task, alias or version, or the alias is several by weight; or an
    ensemble, which is asked as a whole if that is wanted.
    """
    task_id, _, selector = reference.partition("@")
    history = client.call("GET", f"/tasks/{task_id}")
    alias = None if selector.startswith("sha256:") or selector.isdecimal() else selector or DEFAULT_ALIAS
    meaning = history["aliases"].get(alias)
    is_ensemble = or_ensemble and isinstance(meaning, Mapping) and "ensemble" in meaning
    if is_ensemble:
        wanted = next(iter(meaning["weights"]))
    else:
        wanted = selector if alias is None else _only_version(task_id, alias, history["aliases"])
    for row in history["versions"]:
        if wanted in (str(row["version"]), row["version_digest"]):
            release = max((release["number"] for release in history["releases"]), default=0)
            return Version(task_id, alias, row, release, history["aliases"], is_ensemble)
    raise CommandFailed(f"task {task_id} has no version {wanted}; `promptplex show {task_id}` lists them")


def _only_version(task_id: str, alias: str, aliases: Mapping[str, Any]) -> str:
    if alias not in aliases:
        known = ", ".join(aliases) or "none"
        raise CommandFailed(f"task {task_id} has no alias {alias!r}; it has: {known}")
    meaning = aliases[alias]
    if isinstance(meaning, int):
        return str(meaning)
    versions = [meaning["version"]] if "version" in meaning else meaning.get("weights", meaning)
    what = "one of several paraphrases" if "version" in meaning else "several versions"
    raise CommandFailed(
        f"{task_id}@{alias} is {what}; evaluate one version: "
        + ", ".join(f"{task_id}@{version}" for version in versions)
    )


def expected_choices(choices: Sequence[LabelledChoice], items: Sequence[Item]) -> tuple[LabelledChoice, ...]:
    """Return a task's choices under the names that every item expects: their values, else their texts.

    None where an item expects neither, where there is a single choice, and for chats.
    """
    if len(choices) < 2 or is_chat(items):
        return ()
    expected = {expected_label(item) for item in items}
    by_text = [LabelledChoice(value=each.text.strip() or each.value, text=each.text) for each in choices]
    for named in (choices, by_text):
        names = {choice.value for choice in named}
        if expected <= names and len(names) == len(named):
            return tuple(named)
    return ()


def ask_all(
    client: ServerClient, sides: Sequence[Asked], items: Sequence[Item], concurrency: int, label: str
) -> list[list[Outcome]]:
    """Return the outcomes of each side, in the order of the items; a progress bar on stderr.

    The sides take turns, and many requests run at a time, so that the server can batch them. A refused
    request is an outcome. Raise NoAnswer where the server doesn't answer.
    """
    work = [(side, item, number) for number, item in enumerate(items) for side in sides]
    with (
        ThreadPoolExecutor(concurrency) as threads,
        typer.progressbar(length=len(work), label=label, file=typer.get_text_stream("stderr")) as bar,
    ):
        outcomes = []
        for outcome in threads.map(lambda each: _ask(client, *each), work):
            outcomes.append(outcome)
            bar.update(1)
    return [outcomes[number :: len(sides)] for number in range(len(sides))]


def _ask(client: ServerClient, side: Asked, item: Item, number: int) -> Outcome:
    wanted = side.with_answer(item)
    try:
        text, ballots = side.said(client, item, number)
        return Outcome(wanted, text, probabilities=side.probabilities(client, item), ballots=ballots)
    except NoAnswer:
        raise
    except CommandFailed as refusal:
        return Outcome(wanted, "", error=str(refusal))
