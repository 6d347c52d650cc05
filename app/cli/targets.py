"""Where the task commands go: a running server, or a store's directory without one."""

import getpass
import json
from pathlib import Path
from typing import Any, Protocol

from app.cli.bundle import Bundle
from app.cli.server import CommandFailed, NoAnswer, Row, ServerClient
from app.prompt import Prompt, TaskVersion, VersionDraft
from app.serving.manifest import parse_task
from app.store.importers import import_prompt
from app.store.prompt_store import open_store


class Target(Protocol):
    """What the task commands need; both answer in the shapes of API.md's JSON."""

    def tasks(self) -> list[Row]:
        """One row for each task."""
        ...

    def task(self, task_id: str) -> Row:
        """Versions, aliases and releases of one task."""
        ...

    def push(self, task_id: str, bundle: Bundle, alias: str) -> Row:
        """Publish a version; point `alias` at it unless that is `none`."""
        ...

    def rollback(self, task_id: str, alias: str) -> Row:
        """Point `alias` at what it meant before."""
        ...


class ServerTarget:
    """A running server, over HTTP."""

    def __init__(self, url: str) -> None:
        self._url = url

    def tasks(self) -> list[Row]:
        """One row for each task, over all pages."""
        rows: list[Row] = []
        cursor: str | None = None
        while True:
            page = self._call("GET", "/tasks", params={} if cursor is None else {"after": cursor})
            rows += page["tasks"]
            cursor = page.get("next")
            if cursor is None:
                return rows

    def task(self, task_id: str) -> Row:
        """`GET /tasks/{id}`."""
        return self._call("GET", f"/tasks/{task_id}")

    def push(self, task_id: str, bundle: Bundle, alias: str) -> Row:
        """`POST /tasks/{id}/versions`: the server validates and tries it before it answers."""
        parts: dict[str, Any] = {}
        if bundle.prompt is not None:
            parts["prompt"] = ("prompt.safetensors", bundle.prompt, "application/octet-stream")
        if bundle.config is not None:
            parts["config"] = ("adapter_config.json", bundle.config, "application/json")
        if bundle.task is not None:
            parts["task"] = ("task.json", json.dumps(bundle.task).encode(), "application/json")
        return self._call("POST", f"/tasks/{task_id}/versions", params={"alias": alias}, files=parts)

    def rollback(self, task_id: str, alias: str) -> Row:
        """`POST /tasks/{id}/rollback`."""
        return self._call("POST", f"/tasks/{task_id}/rollback", params={"alias": alias})

    def _call(self, method: str, path: str, **options: Any) -> Row:
        with ServerClient(self._url) as client:
            try:
                return client.call(method, path, **options)
            except NoAnswer as error:
                raise NoAnswer(f"{error.message}; or work on a store's files with --store PATH") from None


class StoreTarget:
    """A store's files, without a server: nothing is tried on a model."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._store = open_store(root)
        self._who = f"cli:{getpass.getuser()}"

    def tasks(self) -> list[Row]:
        """One row for each task; without a model nothing is known of servability."""
        if not self._root.is_dir():
            raise CommandFailed(f"there is no store at {self._root}")
        return [self._row(task_id) for task_id in self._store.list_tasks()]

    def task(self, task_id: str) -> Row:
        """Versions, aliases and releases, as the server shows them."""
        history = self._store.history(task_id)
        return {
            "id": history.task_id,
            "aliases": dict(history.releases[-1].aliases) if history.releases else {},
            "versions": [_version_row(version) for version in history.versions],
            "releases": [
                {
                    "number": release.number,
                    "aliases": dict(release.aliases),
                    "who": release.who,
                    "at": release.at,
                }
                for release in history.releases
            ],
        }

    def push(self, task_id: str, bundle: Bundle, alias: str) -> Row:
        """Import and publish; what only a loaded base can check is left to the server."""
        version, _ = self._store.publish(task_id, _draft(bundle))
        row = {"task_id": task_id, **_version_row(version), "release": None}
        if alias != "none":
            row["release"] = self._store.move_alias(task_id, alias, version.version, who=self._who).number
        return row

    def rollback(self, task_id: str, alias: str) -> Row:
        """One more release, with the alias where it was."""
        release = self._store.rollback(task_id, alias, who=self._who)
        return {
            "task_id": task_id,
            "alias": alias,
            "version": release.aliases[alias],
            "release": release.number,
        }

    def _row(self, task_id: str) -> Row:
        live = self._store.resolve(task_id)
        return {"id": task_id, **_version_row(live)}


def _version_row(version: TaskVersion) -> Row:
    return {
        "version": version.version,
        "version_digest": f"sha256:{version.digest}",
        "prompt_digest": version.prompt_digest,
        "kind": str(version.kind),
        "virtual_tokens": version.num_virtual_tokens,
        "template": version.template,
        "defaults": dict(version.defaults),
    }


def _draft(bundle: Bundle) -> VersionDraft:
    """Import and check as the server would, short of what needs the base."""
    prompt: Prompt | None = None
    provenance: dict[str, Any] = {}
    if bundle.prompt is not None:
        prompt, provenance = import_prompt(bundle.prompt, bundle.config)
    task = parse_task(bundle.task)
    if prompt is None and task.template is None:
        raise CommandFailed("a task needs a prompt, a template, or both")
    return VersionDraft(
        prompt=prompt,
        template=task.template,
        defaults=task.defaults,
        choices=task.choices,
        examples=task.examples,
        notes=task.notes,
        base=task.base,
        provenance=provenance,
    )
