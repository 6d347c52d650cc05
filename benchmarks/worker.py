"""A program of another Python that answers JSON lines: peers in virtual environments of their own."""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Worker:
    """The program, from its start, which it reports with a first line, to its end."""

    def __init__(
        self, python: Path, program: Path, *arguments: object, log: Path, environment: Mapping[str, str]
    ) -> None:
        """Start `program`, whose stderr goes to `log`; `environment` is added to this process's own."""
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [str(python), "-P", str(program), *map(str, arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=os.environ | environment,
            )
        self._receive()

    def ask(self, **given: Any) -> list[Any]:
        """Return the answers to what the program is given."""
        assert self._process.stdin is not None
        print(json.dumps(given), file=self._process.stdin, flush=True)
        answers: list[Any] = self._receive()["answers"]
        return answers

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status, last = self._process.wait(), self._log.read_text().strip().splitlines()[-1:]
            raise RuntimeError(f"it ended with status {status}: {''.join(last)} (see {self._log})")
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        """End it, if it hasn't ended."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def reason_to_skip(python: Path, package: str, option: str) -> str | None:
    """Return why a package can't be used by a Python; None: it can."""
    command = [str(python), "-c", f"import {package}"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{python} can't be run ({error.strerror}); name another Python with {option}"
    if found.returncode == 0:
        return None
    last = (found.stderr.strip().splitlines() or ["no message"])[-1]
    return f"{python} can't import {package} ({last}); name another Python with {option}"
