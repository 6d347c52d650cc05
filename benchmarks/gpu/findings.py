"""What a part finds, written as it comes, so that a part that is stopped loses nothing."""

import json
from pathlib import Path
from typing import Any


class Findings:
    """A JSON object in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, Any] = {}

    def note(self, name: str, value: Any) -> None:
        """Add a finding."""
        self._found[name] = value
        half_written = self._path.with_suffix(".new")
        half_written.write_text(json.dumps(self._found, default=str))
        half_written.replace(self._path)


def read_findings(path: Path) -> dict[str, Any]:
    """Return what has been noted in a file, nothing where there is none."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found
