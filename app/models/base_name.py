"""The name of a base model where the operator sets none."""

import re
from pathlib import Path

_SNAPSHOT = re.compile(r"models--(?:.*--)?(?P<name>[^/]+)/snapshots/[^/]+$")
_STRANGE = re.compile(r"[^\w.@-]+", re.ASCII)
_WITHOUT_NAME = "base"  # the root of a file system has none


def base_name(reference: str) -> str:
    """Return the last part of a hub id, or of the directory that a path leads to.

    A snapshot in the cache of the hub's client has the name of its repository. Runs of characters that
    can't be part of a task id become a dash; capitals stay.
    """
    directory = Path(reference).expanduser()
    path = directory.resolve() if directory.is_dir() else Path(reference)
    snapshot = _SNAPSHOT.search(path.as_posix())
    name = snapshot["name"] if snapshot else path.name
    return _STRANGE.sub("-", name).strip("-._") or _WITHOUT_NAME
