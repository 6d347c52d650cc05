"""Tasks, versions and releases as JSON objects: answered over HTTP and by the CLI on a store's files."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired, cast

from pydantic import Field
from typing_extensions import TypedDict

from app.prompt import TaskVersion
from app.serving.program_settings import (
    PLAIN_PROGRAM,
    CalibrationSettings,
    ChainSettings,
    ReasoningSettings,
    Shot,
    VoteSettings,
)
from app.store.releases import Release, TaskHistory
from app.store.traffic_split import AliasTarget, EnsembleTarget, SpreadTarget, target_as_json
from app.validation import closed


@closed
class Ensemble(TypedDict):
    """Several versions that answer each request together."""

    weights: Annotated[dict[str, int], Field(description="What each version's answer counts")]
    ensemble: Literal[True]


@closed
class Spread(TypedDict):
    """A version, of which each user always gets the same paraphrase."""

    version: int
    spread_paraphrases: Literal[True]


# What an alias points at: a version, weights by version, several at once, or one with its paraphrases.
Target = int | dict[str, int] | Ensemble | Spread
Aliases = dict[str, Target]


class TaskLine(TypedDict):
    """A task, as its live version is."""

    id: str
    version: Annotated[
        int | None, Field(description="Live version; null: none is live, or several are by weight")
    ]
    version_digest: str | None
    kind: Annotated[str, Field(description="Kind of the learned prompt")]
    virtual_tokens: Annotated[int, Field(description="Positions that the learned prompt takes")]


class VersionIdentity(TypedDict):
    """The identity of a version."""

    version: int
    version_digest: str
    prompt_digest: Annotated[str | None, Field(description="null: the task has no learned prompt")]
    kind: Annotated[str, Field(description="Kind of the learned prompt")]
    virtual_tokens: Annotated[int, Field(description="Positions that the learned prompt takes")]


@closed
class Example(TypedDict):
    """Inputs of a task, and the answer that is expected."""

    inputs: str | Mapping[str, str]
    expected: str


class Program(TypedDict):
    """What a version says beyond one completion, as it was uploaded."""

    reasoning: Annotated[
        ReasoningSettings | None, Field(description="How the answer is separated from the steps before it")
    ]
    chain: Annotated[ChainSettings | None, Field(description="How steps are fed back to the model")]
    vote: Annotated[VoteSettings | None, Field(description="How many samples are voted on")]
    calibration: Annotated[
        CalibrationSettings | None, Field(description="How probabilities of choices are calibrated")
    ]
    paraphrases: Annotated[list[str], Field(description="Templates that requests may choose beside its own")]
    few_shot: Annotated[list[Shot], Field(description="Worked examples before each request's inputs")]


class VersionContent(VersionIdentity, Program):
    """A version in full."""

    template: str | None
    defaults: Annotated[dict[str, Any], Field(description="Generation parameters of the task")]
    choices: Annotated[list[Any], Field(description="Labels for classification")]
    examples: list[Example]
    notes: str
    base: Annotated[dict[str, Any], Field(description="Base model that the prompt was trained on")]
    provenance: dict[str, Any]


class PublishedVersion(VersionIdentity):
    """The version of an upload."""

    task_id: str
    release: Annotated[int | None, Field(description="Number of the release; null: no alias was moved")]


@closed
class ReleaseRecord(TypedDict):
    """One change to a task's aliases, or to whether it is served."""

    number: int
    action: str
    alias: str | None
    aliases: Annotated[
        Aliases,
        Field(
            description="All aliases afterwards: a version each, weights by version, an ensemble, or a "
            "version with its paraphrases"
        ),
    ]
    retired: bool
    who: Annotated[str, Field(description="Name of the key, or of the user of the CLI")]
    why: str
    at: Annotated[str, Field(description="Time, ISO 8601")]


class HistoryRow(TypedDict):
    """A task without its versions."""

    id: str
    aliases: Aliases
    retired: Annotated[bool, Field(description="Whether the task is out of service")]
    releases: list[ReleaseRecord]


class TargetFields(TypedDict):
    """What an alias points at."""

    version: NotRequired[int | None]
    weights: NotRequired[dict[str, int] | None]
    ensemble: NotRequired[Annotated[bool, Field(description="The versions answer each request together")]]
    spread_paraphrases: NotRequired[
        Annotated[bool, Field(description="Each user always gets the same one of the paraphrases")]
    ]


@closed
class Moved(TargetFields):
    """What an alias points at now: a version, or several by weight or together."""

    task_id: str
    alias: str
    release: Annotated[int, Field(description="Number of the release")]


@closed
class Retirement(TypedDict):
    """Whether a task is retired now."""

    task_id: str
    retired: bool
    release: Annotated[int, Field(description="Number of the release")]


def task_row(task_id: str, live: TaskVersion | None) -> TaskLine:
    """Return a line of the list of tasks; `live` is None where no version is live, or it can't be read."""
    return {
        "id": task_id,
        "version": None if live is None else live.version,
        "version_digest": None if live is None else f"sha256:{live.digest}",
        "kind": "unknown" if live is None else str(live.kind),
        "virtual_tokens": 0 if live is None else live.num_virtual_tokens,
    }


def history_row(history: TaskHistory) -> HistoryRow:
    """Return a task without its versions."""
    return {
        "id": history.task_id,
        "aliases": _aliases(history.aliases),
        "retired": history.retired,
        "releases": [_release(release) for release in history.releases],
    }


def _identity(version: TaskVersion) -> VersionIdentity:
    """Return the identity of a version."""
    return {
        "version": version.version,
        "version_digest": f"sha256:{version.digest}",
        "prompt_digest": version.prompt_digest,
        "kind": str(version.kind),
        "virtual_tokens": version.num_virtual_tokens,
    }


def version_row(version: TaskVersion) -> VersionContent:
    """Return a version in full."""
    return {
        **_identity(version),
        "template": version.template,
        "defaults": dict(version.defaults),
        "choices": list(version.choices),
        "examples": [
            {"inputs": example["inputs"], "expected": example["expected"]} for example in version.examples
        ],
        "notes": version.notes,
        "base": dict(version.base),
        "provenance": dict(version.provenance),
        **_program(version),
    }


def _program(version: TaskVersion) -> Program:
    plain = PLAIN_PROGRAM.model_dump()
    return cast(Program, {name: version.program.get(name, default) for name, default in plain.items()})


def published_row(version: TaskVersion, release: Release | None) -> PublishedVersion:
    """Return the version of an upload, and the release that points an alias at it."""
    number = None if release is None else release.number
    return {"task_id": version.task_id, **_identity(version), "release": number}


def moved_row(release: Release, alias: str) -> Moved:
    """Return what an alias points at after a release."""
    target = target_fields(release.aliases[alias])
    return {"task_id": release.task_id, "alias": alias, "release": release.number, **target}


def target_fields(target: AliasTarget) -> TargetFields:
    """Return what an alias points at as fields of an object."""
    value = target_as_json(target)
    if isinstance(target, EnsembleTarget | SpreadTarget):
        fields: TargetFields = value
        return fields
    return {"version": value} if isinstance(target, int) else {"weights": value}


def retirement_row(release: Release) -> Retirement:
    """Return whether a task is retired after a release."""
    return {"task_id": release.task_id, "retired": release.retired, "release": release.number}


def _release(release: Release) -> ReleaseRecord:
    return {
        "number": release.number,
        "action": release.action,
        "alias": release.alias,
        "aliases": _aliases(release.aliases),
        "retired": release.retired,
        "who": release.who,
        "why": release.why,
        "at": release.at,
    }


def _aliases(aliases: Mapping[str, AliasTarget]) -> Aliases:
    return {alias: target_as_json(target) for alias, target in aliases.items()}
