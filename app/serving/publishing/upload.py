"""What an uploader sends, and what becomes of it: all of publishing that needs no model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from app.errors import InvalidRequest, PromptRejected
from app.prompt import ModelGeometry, Prompt, TaskVersion, VersionDraft
from app.serving.publishing.task_settings import parse_task
from app.store.importers import import_prompt
from app.store.prompt_store import PromptStore
from app.store.references import DEFAULT_ALIAS, check_alias
from app.store.releases import Release
from app.store.saved_tensors import ADVICE, SavedTensor
from app.store.source_files import PROMPT
from app.strict_json import excerpt

TASK = "task"  # the part of an upload that isn't a file of its prompt
NO_ALIAS = "none"
CheckSaved = Callable[[SavedTensor], None]  # raises PromptRejected for a tensor that isn't the base's own


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


def draft_version(
    upload: Upload, check_saved: CheckSaved = refuse_saved, base: ModelGeometry | None = None
) -> VersionDraft:
    """Check an upload and import its prompt, with the help of `base` if one is loaded.

    Whether the prompt fits a base is left to the caller. `check_saved` is called for every tensor beside the
    prompt. Raise InvalidRequest, PromptRejected (UnsafeFile).
    """
    if upload.target_alias is not None:
        check_alias(upload.target_alias)
    draft = parse_task(upload.task)
    prompt, provenance = _import(upload, draft, check_saved, base)
    return replace(
        draft,
        prompt=prompt,
        provenance={
            **provenance,
            **draft.provenance,
            "uploader": upload.who,
            "meant_for": upload.target_alias,  # None: uploaded so that no alias would point at it
        },
    )


def _import(
    upload: Upload, draft: VersionDraft, check_saved: CheckSaved, base: ModelGeometry | None
) -> tuple[Prompt | None, Mapping[str, Any]]:
    """Return the prompt and its provenance."""
    if PROMPT in upload.files:
        imported = import_prompt(upload.files, base)
        for saved in imported.beside:
            check_saved(saved)
        return imported.prompt, imported.provenance
    if upload.files:
        raise InvalidRequest(
            "There is a config without a prompt: send adapter_model.safetensors as part 'prompt'.",
            param="prompt",
        )
    if draft.template is None and "chain" not in draft.program:
        raise InvalidRequest(
            "There is nothing to publish: send a prompt, or a task with a template, or both.", param="prompt"
        )
    return None, {"source_format": "template"}


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
