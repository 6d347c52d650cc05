"""Scrubbing: verifying everything at rest, and healing damage from what is left elsewhere.

Reading finds damage where it is read; this reads everything. Records are put back as they were when
this process read and verified them, prompts from any other tier that still has their bytes.
"""

import hashlib
import logging
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from app.errors import CorruptData, PromptplexError
from app.store.files import QUARANTINE, Name
from app.store.history import release_name, version_name
from app.store.manifests import MAX_MANIFEST_BYTES, encode_version, is_sealed
from app.store.prompt_store import PromptStore
from app.store.releases import MAX_RELEASE_BYTES, TaskHistory, encode_release

_log = logging.getLogger(__name__)
MAX_RECORD_BYTES = max(MAX_MANIFEST_BYTES, MAX_RELEASE_BYTES)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something in the store that is not as it was written."""

    message: str
    healed: bool = False


def scrub(store: PromptStore, fetch: Callable[[str], bytes] | None = None) -> Iterator[Finding]:
    """Read and verify everything, one task and one prompt at a time; heal what can be healed.

    `fetch` returns the bytes of a prompt, by digest, from other tiers, or raises PromptplexError.
    """
    referenced: set[str] = set()
    for task_id in sorted({*store.list_tasks(), *store.histories.cached_ids()}):
        try:
            history = _read_all(store, task_id)
        except CorruptData as error:
            healed = heal_records(store, task_id)
            yield Finding(error.message, healed)
            if not healed:
                continue
            history = store.histories.read_afresh(task_id)
        referenced |= {version.prompt_digest for version in history.versions if version.prompt_digest}
    for digest in sorted(referenced.union(store.blobs.digests())):
        try:
            store.read_blob(digest)
        except CorruptData as error:
            yield Finding(error.message, fetch is not None and _heal_blob(store, digest, fetch))


def _read_all(store: PromptStore, task_id: str) -> TaskHistory:
    """Return the history by the files. Raise CorruptData where this process knows another one."""
    known = store.histories.cached(task_id)
    history = store.histories.read_afresh(task_id)
    if known is None:
        return history
    same_versions = all(a.digest == b.digest for a, b in zip(known.versions, history.versions, strict=False))
    same_releases = all(a.digest == b.digest for a, b in zip(known.releases, history.releases, strict=False))
    if not (same_versions and same_releases):
        store.histories.forget(task_id)
        raise CorruptData(
            f"The past of task {task_id!r} was changed: a record was lost, and its number claimed anew"
        )
    if len(history.versions) < len(known.versions) or len(history.releases) < len(known.releases):
        raise CorruptData(f"Task {task_id!r} has lost its last version or release")
    return history


def heal_records(store: PromptStore, task_id: str) -> bool:
    """Put a task's records back as this process knows them. Return False where it doesn't, or can't."""
    known = store.histories.cached(task_id)
    if known is None:
        return False
    records = [
        (version_name(task_id, version.version), version.digest, encode_version(version))
        for version in known.versions
    ]
    records += [
        (release_name(task_id, release.number), release.digest, encode_release(release))
        for release in known.releases
    ]
    try:
        for name, digest, data in records:
            assert hashlib.sha256(data).hexdigest() == digest
            _heal(store, name, data)
        store.histories.read_afresh(task_id)
    except PromptplexError as error:
        _log.error("the records of task %s are damaged and can't be healed: %s", task_id, error)
        return False
    return True


def _heal_blob(store: PromptStore, digest: str, fetch: Callable[[str], bytes]) -> bool:
    try:
        store.heal_blob(digest, fetch(digest))
    except PromptplexError as error:
        _log.error("prompt %s can't be healed: %s", digest, error)
        return False
    return True


def _heal(store: PromptStore, name: Name, good: bytes) -> None:
    try:
        found = store.files.read(name, MAX_RECORD_BYTES)
    except CorruptData:  # too large a file, or none that can be read: no record in any case
        store.files.replace(name, good)
    else:
        if found == good:
            return
        _put_back(store, name, found, good)
    _log.warning("%s was damaged; it is healed", "/".join(name))


def _put_back(store: PromptStore, name: Name, found: bytes | None, good: bytes) -> None:
    if found is None:
        if not store.files.put_if_absent(name, good) and store.files.read(name, MAX_RECORD_BYTES) != good:
            raise CorruptData(f"{'/'.join(name)} was claimed anew")
    elif is_sealed(found):
        raise CorruptData(f"{'/'.join(name)} is another record now")
    else:
        store.files.put_if_absent((QUARANTINE, f"{'-'.join(name)}.{secrets.token_hex(4)}"), found)
        store.files.replace(name, good)
