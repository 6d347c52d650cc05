"""Print the requirements for serving, one a line, from the `pyproject.toml` in this directory."""

import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
print(*project["dependencies"], *project["optional-dependencies"]["otel"], sep="\n")
