"""Processes of tests' own, forked from one that has imported torch, transformers and the server.

Those imports take 3 s of CPU; a fork has them at once, in memory that all share. The process that is forked
runs no threads. Tests of imports, of the interpreter's end and of other users start an interpreter instead.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from io import TextIOWrapper
from multiprocessing.connection import Connection

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.preloaded"])


class Forked:
    """A command of `promptplex` in a process of its own; to be used as a `subprocess.Popen`."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], fault: str = "") -> None:
        reader, writer = os.pipe()
        stderr = Connection(writer, readable=False)
        self._process = FORKS.Process(
            target=_run, args=(list(arguments), dict(environment), os.getcwd(), fault, stderr)
        )
        self._process.start()
        stderr.close()
        assert self._process.pid is not None
        self.pid = self._process.pid
        self.stderr: TextIOWrapper = os.fdopen(reader)

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        status = self.poll()
        if status is None:
            raise subprocess.TimeoutExpired("promptplex", timeout or 0.0)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(
    arguments: list[str], environment: dict[str, str], folder: str, fault: str, stderr: Connection
) -> None:
    os.dup2(stderr.fileno(), 2)
    stderr.close()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["promptplex", *arguments]
    exec(fault, {"__name__": "fault"})
    main: Callable[[], None] = sys.modules["app.cli"].main
    main()
