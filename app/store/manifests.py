"""Version manifests: TaskVersion <-> canonical JSON. A version's identity is the sha256 of it.

Every record carries a checksum of the rest of itself, so that a changed bit is noticed also where no
release names the record's digest yet.
"""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from app.errors import CorruptData, InvalidRequest
from app.prompt import PromptKind, TaskVersion, VersionDraft
from app.store.prompt_file import prompt_geometry
from app.strict_json import JsonError, canonical_json, encode_parsed, parse_json

MAX_MANIFEST_BYTES = 1 << 20
FORMAT = "promptplex.version/2"
FORMAT_WITH_PROGRAM = "promptplex.version/3"  # servers that know no programs refuse it

# What makes two uploads the same version. Provenance (who, when, from what file) does not count.
_DRAFTED = ("template", "defaults", "choices", "examples", "notes", "base")
_SETTINGS = ("prompt_digest", *_DRAFTED)
_LEARNED = ("kind", "num_virtual_tokens", "position_offset", "geometry")  # follows from the prompt
_CHECKSUM = "checksum"
_FIELDS = frozenset({"format", "task_id", "version", *_SETTINGS, *_LEARNED, "provenance"})
_PROGRAM = "program"


def version_of(task_id: str, number: int, draft: VersionDraft) -> TaskVersion:
    """Return the version that a draft becomes, but for its digest.

    Raise InvalidRequest where settings or provenance aren't JSON.
    """
    prompt = draft.prompt
    fields = _plain({name: getattr(draft, name) for name in (*_DRAFTED, _PROGRAM)}, "task") | {
        "task_id": task_id,
        "version": number,
        "prompt_digest": None if prompt is None else prompt.digest,
        "kind": PromptKind.TEXT if prompt is None else prompt.kind,
        "num_virtual_tokens": 0 if prompt is None else prompt.num_virtual_tokens,
        "position_offset": 0 if prompt is None else prompt.position_offset,
        "geometry": None if prompt is None else prompt_geometry(prompt),
        "provenance": _plain(draft.provenance, "provenance") | {"published_at": now()},
    }
    return _version(fields, digest="")


def settings_of(version: TaskVersion) -> bytes:
    """Return a version's settings as canonical JSON: versions with equal settings are the same."""
    return canonical_json({name: getattr(version, name) for name in _SETTINGS} | _program_of(version))


def encode_version(version: TaskVersion) -> bytes:
    """Return the manifest of a version. Raise InvalidRequest where it is too long."""
    fields = {name: getattr(version, name) for name in _FIELDS - {"format", "kind"}} | _program_of(version)
    record_format = FORMAT_WITH_PROGRAM if version.program else FORMAT
    data = seal(fields | {"format": record_format, "kind": version.kind.value})
    if len(data) > MAX_MANIFEST_BYTES:
        raise InvalidRequest(f"The task's settings exceed {MAX_MANIFEST_BYTES} bytes as JSON", param="task")
    return data


def decode_version(task_id: str, number: int, data: bytes) -> TaskVersion:
    """Read a manifest back. Raise CorruptData where it is not what `encode_version` wrote."""
    what = f"version {number} of task {task_id!r}"
    fields = decode_record(data, what, {FORMAT: _FIELDS, FORMAT_WITH_PROGRAM: _FIELDS | {_PROGRAM}})
    if (fields["task_id"], fields["version"]) != (task_id, number):
        raise CorruptData(f"The manifest of {what} belongs elsewhere")
    try:
        # One string for all records of a task.
        return _version(fields | {"task_id": task_id}, hashlib.sha256(data).hexdigest())
    except (TypeError, ValueError):
        raise CorruptData(f"The manifest of {what} has a field of the wrong type") from None


def seal(fields: dict[str, Any]) -> bytes:
    """Return the record of `fields`, with a checksum over them."""
    return canonical_json(fields | {_CHECKSUM: _checksum(fields)})


def decode_record(data: bytes, what: str, formats: Mapping[str, frozenset[str]]) -> dict[str, Any]:
    """Parse a sealed record: right checksum, and the exact fields of its format, one of `formats`.

    Raise CorruptData.
    """
    fields: dict[str, Any]
    try:
        fields = parse_json(data)
    except JsonError as error:
        raise CorruptData(f"The record of {what} is damaged: {error}") from None
    names = formats.get(str(fields.get("format"))) if isinstance(fields, dict) else None
    if names is None:
        known = " or ".join(formats)
        raise CorruptData(f"The record of {what} is damaged, or of another format than {known}")
    checksum = fields.pop(_CHECKSUM, None)
    if checksum != hashlib.sha256(encode_parsed(fields)).hexdigest():
        raise CorruptData(f"The record of {what} is damaged: it does not match its own checksum")
    if fields.keys() != names or encode_parsed(fields | {_CHECKSUM: checksum}) != data:
        raise CorruptData(f"The record of {what} is damaged: it is not in canonical form")
    return fields


def is_sealed(data: bytes) -> bool:
    """Return whether these are the bytes of some record."""
    with suppress(JsonError):
        fields = parse_json(data)
        if isinstance(fields, dict) and _CHECKSUM in fields:
            return bool(fields.pop(_CHECKSUM) == _checksum(fields))
    return False


def _program_of(version: TaskVersion) -> dict[str, Any]:
    """Return the field that only versions with a program have, so that others stay what they are."""
    return {_PROGRAM: version.program} if version.program else {}


def _checksum(fields: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(fields)).hexdigest()


def now() -> str:
    """Return the time for records, in UTC."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _plain(value: Mapping[str, Any], param: str) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = parse_json(canonical_json(value))
    except JsonError as error:
        raise InvalidRequest(f"The task's settings are not JSON: {error}", param=param) from None
    return plain


def _version(fields: dict[str, Any], digest: str) -> TaskVersion:
    return TaskVersion(
        task_id=fields["task_id"],
        version=fields["version"],
        digest=digest,
        kind=PromptKind(fields["kind"]),
        prompt_digest=fields["prompt_digest"],
        num_virtual_tokens=int(fields["num_virtual_tokens"]),
        position_offset=int(fields["position_offset"]),
        template=fields["template"],
        defaults=dict(fields["defaults"]),
        choices=tuple(fields["choices"]),
        examples=tuple(fields["examples"]),
        notes=fields["notes"],
        base=dict(fields["base"]),
        provenance=dict(fields["provenance"]),
        geometry=fields["geometry"],
        program=dict(fields.get(_PROGRAM, {})),
    )
