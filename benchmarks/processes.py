"""Sides in processes of their own.

Threads of one side must not slow another one down: idle OpenMP workers of any thread of a process make the
workers of all its threads sleep between parallel regions. A process whose turn it isn't waits for a message.
"""

import multiprocessing
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import psutil

from benchmarks.sides import Answer, Side
from benchmarks.work import Ask, Work

_SAMPLE_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a side, timed where it ran."""

    seconds: float
    answers: list[Answer]
    extra_memory: int | None = None  # bytes above the idle process, at the peak


class RemoteSide:
    """A side, seen from the benchmark's own process."""

    def __init__(
        self, process: "SideProcess", number: int, name: str, uses_prompts: bool, work: Work
    ) -> None:
        self.name = name
        self.uses_prompts = uses_prompts
        self.work = work
        self._process = process
        self._number = number

    @property
    def process(self) -> "SideProcess":
        """Where it runs."""
        return self._process

    def run(self, asks: Sequence[Ask], *, watch_memory: bool = False) -> Run:
        """Do the work once."""
        run: Run = self._process.call(self._number, "run", asks, watch_memory)
        return run

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call another method of the side."""
        return self._process.call(self._number, method, *arguments)


class SideProcess:
    """A process that builds sides and runs one of them when told."""

    def __init__(self, build: Callable[..., Sequence[Side]], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, arguments), daemon=True)
        self._process.start()
        theirs.close()
        described: list[tuple[str, bool, Work]] = self._receive()
        self.sides = [RemoteSide(self, number, *each) for number, each in enumerate(described)]

    def call(self, number: int, method: str, *arguments: Any) -> Any:
        """Raises RuntimeError with the traceback of whatever failed there."""
        self._pipe.send((number, method, arguments))
        return self._receive()

    def cpu_seconds(self) -> float:
        """CPU time that the process and its children have had so far."""
        process = psutil.Process(self._process.pid)
        times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
        return float(sum(each.user + each.system for each in times))

    def _receive(self) -> Any:
        try:
            is_error, value = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"a side's process ended with status {self._process.exitcode}") from None
        if is_error:
            raise RuntimeError(f"a side failed:\n{value}")
        return value

    def close(self) -> None:
        """Let the sides free what they hold, then end."""
        self._pipe.close()
        self._process.join(60)
        if self._process.is_alive():
            self._process.kill()


def _serve(pipe: Connection, build: Callable[..., Sequence[Side]], arguments: tuple[Any, ...]) -> None:
    # PEFT repeats two notes that don't bear on this work.
    warnings.filterwarnings("ignore", message="Position ids are not supported|`is_gradient_checkpointing`")
    sides: Sequence[Side] = []
    try:
        sides = build(*arguments)
        pipe.send((False, [(side.name, side.uses_prompts, side.work) for side in sides]))
        while True:
            number, method, rest = pipe.recv()
            pipe.send((False, _call(sides[number], method, rest)))
    except (EOFError, BrokenPipeError):  # the benchmark is done, or gone
        pass
    except Exception:
        pipe.send((True, traceback.format_exc()))
    finally:
        for side in sides:
            side.close()


def _call(side: Side, method: str, arguments: tuple[Any, ...]) -> Any:
    return _run(side, *arguments) if method == "run" else getattr(side, method)(*arguments)


def _run(side: Side, asks: Sequence[Ask], watch_memory: bool) -> Run:
    if watch_memory:
        with MemoryWatch() as memory:
            run = _run(side, asks, False)
        return Run(run.seconds, run.answers, memory.extra)
    began = time.perf_counter()
    answers = side.run(asks)
    return Run(time.perf_counter() - began, answers)


class MemoryWatch:
    """The most resident memory of this process within a block, above what it had before, in bytes."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._before = self._peak = 0

    def __enter__(self) -> "MemoryWatch":
        self._before = self._peak = self._process.memory_info().rss
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self._peak = max(self._peak, self._process.memory_info().rss)

    @property
    def extra(self) -> int:
        """Bytes."""
        return self._peak - self._before
