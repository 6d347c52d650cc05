"""The directory under the user's cache in which compiled kernels and digests of weights are kept."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """Return its path, after making it with rights for its owner alone where it doesn't exist.

    Raise OSError: it can't be made.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root.mkdir(parents=True, exist_ok=True)
    directory = root / "promptplex"
    directory.mkdir(mode=0o700, exist_ok=True)
    return directory
