"""Tasks, versions and releases as JSON objects: answered over HTTP and by the CLI on a store's files."""

from collections.abc import Mapping
from typing import Any

from app.prompt import TaskVersion
from app.store.prompt_store import Release, TaskHistory
from app.store.traffic_split import Meaning, meaning_as_json

Row = dict[str, Any]


def task_row(task_id: str, live: TaskVersion | None) -> Row:
    """Return a line of the list of tasks; `live` is None where no version is live, or it can't be read."""
    return {
        "id": task_id,
        "version": None if live is None else live.version,
        "version_digest": None if live is None else f"sha256:{live.digest}",
        "kind": "unknown" if live is None else str(live.kind),
        "virtual_tokens": 0 if live is None else live.num_virtual_tokens,
    }


def history_row(history: TaskHistory, versions: list[Row]) -> Row:
    """Return a task in full; `versions` as the caller knows them."""
    return {
        "id": history.task_id,
        "aliases": _aliases(history.aliases),
        "retired": history.retired,
        "versions": versions,
        "releases": [_release(release) for release in history.releases],
    }


def _identity(version: TaskVersion) -> Row:
    """Return what tells a version from others."""
    return {
        "version": version.version,
        "version_digest": f"sha256:{version.digest}",
        "prompt_digest": version.prompt_digest,
        "kind": str(version.kind),
        "virtual_tokens": version.num_virtual_tokens,
    }


def version_row(version: TaskVersion) -> Row:
    """Return a version in full."""
    return _identity(version) | {
        "template": version.template,
        "defaults": dict(version.defaults),
        "choices": list(version.choices),
        "examples": [dict(example) for example in version.examples],
        "notes": version.notes,
        "base": dict(version.base),
        "provenance": dict(version.provenance),
    }


def published_row(version: TaskVersion, release: Release | None) -> Row:
    """Return a version that an upload made, or found, and the release that points an alias at it."""
    number = None if release is None else release.number
    return {"task_id": version.task_id, **_identity(version), "release": number}


def moved_row(release: Release, alias: str) -> Row:
    """Return what an alias points at after a release."""
    meaning = release.aliases[alias]
    target = {"version": meaning} if isinstance(meaning, int) else {"weights": meaning_as_json(meaning)}
    return {"task_id": release.task_id, "alias": alias, **target, "release": release.number}


def retirement_row(release: Release) -> Row:
    """Return whether a task is retired after a release."""
    return {"task_id": release.task_id, "retired": release.retired, "release": release.number}


def _release(release: Release) -> Row:
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


def _aliases(aliases: Mapping[str, Meaning]) -> Row:
    return {alias: meaning_as_json(meaning) for alias, meaning in aliases.items()}
