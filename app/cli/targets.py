"""Where the task commands go: a running server, or a store's directory without one."""

import getpass
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from app.cli.server import CommandFailed, NoAnswer, Row, ServerClient
from app.errors import CorruptData, NotFound
from app.serving.publishing.upload import TASK, Upload, draft_version, needs_release, release_version
from app.serving.task_rows import (
    history_row,
    moved_row,
    published_row,
    retirement_row,
    target_fields,
    task_row,
    version_row,
)
from app.store.importers.peft import TENSOR
from app.store.prompt_store import open_store
from app.store.references import DEFAULT_ALIAS
from app.store.saved_tensors import holds_others, without_others
from app.store.source_files import PROMPT, SourceFile
from app.store.traffic_split import AliasTarget


class ServerTarget:
    """A running server, over HTTP."""

    def __init__(self, url: str, key: str | None) -> None:
        self._url = url
        self._key = key

    def tasks(self) -> list[Row]:
        """Return one row for each task, over all pages."""
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

    def push(self, task_id: str, upload: Upload) -> Row:
        """`POST /tasks/{id}/versions`: the server validates and tries it before it answers."""
        parts = dict(upload.files)
        if PROMPT in parts:
            parts[PROMPT] = self._without_embeddings(parts[PROMPT])
        if upload.task is not None:
            parts[TASK] = json.dumps(upload.task).encode()
        return self._call(
            "POST",
            f"/tasks/{task_id}/versions",
            params={} if upload.alias is None else {"alias": upload.alias},
            files={name: (name, data) for name, data in parts.items()},
        )

    def _without_embeddings(self, prompt: bytes) -> bytes:
        """The base's own embeddings can be many times the prompt: only their digests are sent."""
        file = SourceFile(prompt).safetensors_or_none
        if file is None or not holds_others(file, TENSOR):
            return prompt
        info = self._call("GET", "/info")
        return without_others(file, TENSOR, rows=info["vocab_size"], base_dtype=info["model_dtype"])

    def rollback(self, task_id: str, alias: str, why: str) -> Row:
        """`POST /tasks/{id}/rollback`."""
        return self._call("POST", f"/tasks/{task_id}/rollback", json={"alias": alias, "why": why})

    def move_alias(
        self, task_id: str, alias: str, target: AliasTarget, expected_release: int | None, why: str
    ) -> Row:
        """`PUT /tasks/{id}/aliases/{alias}`."""
        body = {**target_fields(target), "expected_release": expected_release, "why": why}
        return self._call("PUT", f"/tasks/{task_id}/aliases/{alias}", json=body)

    def retire(self, task_id: str, why: str) -> Row:
        """`DELETE /tasks/{id}`."""
        return self._call("DELETE", f"/tasks/{task_id}", params={"why": why})

    def restore(self, task_id: str, why: str) -> Row:
        """`POST /tasks/{id}/restore`."""
        return self._call("POST", f"/tasks/{task_id}/restore", json={"why": why})

    def _call(self, method: str, path: str, **options: Any) -> Row:
        with ServerClient(self._url, self._key) as client:
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
        """Return one row for each task; whether a base can serve it isn't known here."""
        if not self._root.is_dir():
            raise CommandFailed(f"there is no store at {self._root}")
        return [self._row(task_id) for task_id in self._store.list_tasks()]

    def task(self, task_id: str) -> Row:
        """Return versions, aliases and releases, as the server shows them."""
        history = self._store.history(task_id)
        return {**history_row(history), "versions": [version_row(version) for version in history.versions]}

    def push(self, task_id: str, upload: Upload) -> Row:
        """Import and publish, without the checks that need a loaded base."""
        upload = replace(upload, who=self._who)
        version, created = self._store.publish(task_id, draft_version(upload))
        release = None
        if needs_release(self._store, upload, version, created=created):
            release = release_version(self._store, upload, version)
        return published_row(version, release)

    def rollback(self, task_id: str, alias: str, why: str) -> Row:
        """Point an alias back at its previous target."""
        return moved_row(self._store.rollback(task_id, alias, who=self._who, why=why), alias)

    def move_alias(
        self, task_id: str, alias: str, target: AliasTarget, expected_release: int | None, why: str
    ) -> Row:
        """Point an alias at a version, or at several."""
        release = self._store.move_alias(
            task_id, alias, target, expected_release=expected_release, who=self._who, why=why
        )
        return moved_row(release, alias)

    def retire(self, task_id: str, why: str) -> Row:
        """Take the task out of service."""
        return retirement_row(self._store.retire(task_id, who=self._who, why=why))

    def restore(self, task_id: str, why: str) -> Row:
        """Bring the task back."""
        return retirement_row(self._store.restore(task_id, who=self._who, why=why))

    def _row(self, task_id: str) -> Row:
        try:
            return task_row(task_id, self._store.alias_versions(task_id, DEFAULT_ALIAS)[0])
        except (NotFound, CorruptData) as error:  # no live version, retired, damaged: the others still count
            return {**task_row(task_id, None), "servable": False, "not_servable_because": error.message}


Target = ServerTarget | StoreTarget  # both answer in the shapes of API.md's JSON
