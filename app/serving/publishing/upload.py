"""What an uploader sends, and what becomes of it: all of publishing that needs no model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from app.errors import InvalidRequest, PromptRejected
from app.prompt import TaskVersion, VersionDraft
from app.serving.publishing.task_settings import TaskSettings, parse_task
from app.store.importers import import_prompt
from app.store.prompt_store import PromptStore, Release
from app.store.references import DEFAULT_ALIAS, check_alias
from app.store.saved_tensors import ADVICE, SavedTensor
from app.store.source_files import PROMPT, Imported
from app.strict_json import excerpt

TASK = "task"  # the part of an upload that isn't a file of its prompt
NO_ALIAS = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """The parts of one upload, and what is to become of it."""

    files: Mapping[str, bytes]  # of a prompt, by name (PROMPT, CONFIG); none: a text-only task
    task: Mapping[str, Any] | None  # settings
    alias: str | None = None  # to point at the version; None: live, if the version is new; or NO_ALIAS
    who: str = ""  # sends it

    @property
    def target_alias(self) -> str | None:
        """Return the alias to point at the version; None: none."""
        return None if self.alias == NO_ALIAS else self.alias or DEFAULT_ALIAS


def refuse_saved(saved: SavedTensor) -> None:
    """Raise PromptRejected: there is no base here to compare the tensor with."""
    raise PromptRejected(
        "Unexpected tensor: where it is the base's own, push to a running server, which compares it, "
        f"or {ADVICE}",
        tensor=excerpt(saved.name),
        expected="prompt_embeddings alone",
    )


def draft_version(upload: Upload, check_saved: Callable[[SavedTensor], None] = refuse_saved) -> VersionDraft:
    """Check an upload and import its prompt; whether it fits a base is left to the caller.

    `check_saved` raises PromptRejected for a tensor beside the prompt that isn't the base's own.
    Raise InvalidRequest, PromptRejected (UnsafeFile).
    """
    if upload.target_alias is not None:
        check_alias(upload.target_alias)
    settings = parse_task(upload.task)
    imported = _import(upload, settings)
    for saved in imported.beside if imported else ():
        check_saved(saved)
    return VersionDraft(
        prompt=imported.prompt if imported else None,
        template=settings.template,
        defaults=settings.defaults,
        choices=settings.choices,
        examples=settings.examples,
        notes=settings.notes,
        base=settings.base,
        provenance={
            **(imported.provenance if imported else {"source_format": "template"}),
            "uploader": upload.who,
            "meant_for": upload.target_alias,  # None: uploaded so that no alias would point at it
            "metrics": dict(settings.metrics),
        },
    )


def _import(upload: Upload, settings: TaskSettings) -> Imported | None:
    if PROMPT in upload.files:
        return import_prompt(upload.files)
    if upload.files:
        raise InvalidRequest(
            "There is a config without a prompt: send adapter_model.safetensors as part 'prompt'.",
            param="prompt",
        )
    if settings.template is None:
        raise InvalidRequest(
            "There is nothing to publish: send a prompt, or a task with a template, or both.", param="prompt"
        )
    return None


def needs_release(store: PromptStore, upload: Upload, version: TaskVersion, *, created: bool) -> bool:
    """Return whether an alias is to point at a version that was just published, or found.

    A version that was there before needs a release only where the uploader named the alias, or where no
    release has named the version yet, as after a crash between storing and releasing.
    """
    if upload.target_alias is None:
        return False
    return created or upload.alias is not None or _was_never_released(store, version)


def _was_never_released(store: PromptStore, version: TaskVersion) -> bool:
    if version.provenance.get("meant_for") is None:
        return False
    releases = store.history(version.task_id).releases
    return all(version.version not in release.manifest_digests for release in releases)


def release_version(store: PromptStore, upload: Upload, version: TaskVersion) -> Release:
    """Point the upload's alias at its version. Raise Conflict, StoreFull."""
    assert upload.target_alias is not None
    return store.move_alias(
        version.task_id, upload.target_alias, version.version, who=upload.who, why="upload"
    )
