"""What a base model is called where its operator gives it no name."""

import re
from pathlib import Path

_SNAPSHOT = re.compile(r"models--(?:.*--)?(?P<name>[^/]+)/snapshots/[^/]+$")
_STRANGE = re.compile(r"[^\w.@-]+", re.ASCII)
_WITHOUT_NAME = "base"  # the root of a file system has none


def base_name(reference: str) -> str:
    """The last part of a hub id, or of the directory that a path leads to.

    A snapshot in the cache of the hub's client is called as its repository. Runs of characters that
    can't be part of a task id become a dash; capitals stay.
    """
    directory = Path(reference).expanduser()
    path = directory.resolve() if directory.is_dir() else Path(reference)
    snapshot = _SNAPSHOT.search(path.as_posix())
    name = snapshot["name"] if snapshot else path.name
    return _STRANGE.sub("-", name).strip("-._") or _WITHOUT_NAME
