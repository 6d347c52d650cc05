"""The process of a training run: what it may use, what it knows of this server, and its end."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import app
from app.host_memory import host_memory

_LEAST_MEMORY = 2 << 30  # bytes, of which the engine that answers may take 1 GiB for keys and values
_SHARE_OF_FREE = 0.5
# What the command needs of this server's environment: neither keys nor addresses nor tokens are among it.
_KEPT = frozenset({
    "PATH", "HOME", "USER", "LANG", "TMPDIR", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "XDG_CACHE_HOME",
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER",  # cuda:0 is the server's own
    "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE", "CUDA_HOME",
})  # fmt: skip
_KEPT_PREFIXES = ("LC_", "GOMP_", "KMP_", "MALLOC_")
_LOG_BYTES = 16_384  # of the end of its output, in which its last line is looked for
_ERROR = "error: "  # begins the line in which a command says what went wrong
_NO_MEMORY = ("MemoryError", "can't allocate memory", "Cannot allocate memory", "bad_alloc")
MAX_ERROR_CHARS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessLimits:
    """What a run may take beside serving."""

    threads: int | None = None  # None: half of the cores
    memory_bytes: int | None = None  # of private memory; None: half of what is free when it starts
    device: str = "cpu"

    @property
    def num_threads(self) -> int:
        """Return the number of threads of a product."""
        return self.threads or max(1, len(os.sched_getaffinity(0)) // 2)

    def memory(self) -> int:
        """Return the bound of a run that starts now, in bytes."""
        return self.memory_bytes or max(_LEAST_MEMORY, int(host_memory()[1] * _SHARE_OF_FREE))


class TrainingProcess:
    """A command that runs under the limits. Its output goes to a file."""

    def __init__(self, command: Sequence[str], limits: ProcessLimits, log: Path) -> None:
        """Start it; it ends when the calling thread ends, at the latest. Raise OSError."""
        self._log = log
        self.memory = limits.memory()
        launcher = [sys.executable, "-P", "-m", "app.serving.training_runs.launcher"]
        with log.open("wb") as output:
            # A group of its own, so that Ctrl-C reaches the server alone. But no session of its own: Linux
            # gives each session the same share of the cores, however low its processes' priority is.
            self._process = subprocess.Popen(
                [*launcher, str(os.getpid()), str(self.memory), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment(os.environ, limits),
                process_group=0,
            )

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether it hasn't ended; one that has is reaped."""
        return self._process.poll() is None

    @property
    def status(self) -> int | None:
        """The exit status, of a signal its number below 0; None: it runs."""
        return self._process.returncode

    def wait(self, seconds: float) -> None:
        """Wait for its end, so many seconds at most."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def end(self, grace: float) -> None:
        """End it: SIGTERM, and SIGKILL after so many seconds."""
        self._signal(signal.SIGTERM)
        self.wait(grace)
        if self.is_running:
            self._signal(signal.SIGKILL)
            self._process.wait()

    def _signal(self, number: int) -> None:
        """Send a signal to it and to what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def tail(self) -> str:
        """Return the end of its output."""
        with self._log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_BYTES))
            return file.read(_LOG_BYTES).decode(errors="replace")

    def error(self) -> str | None:
        """Return in a line why it failed; None: only its output says more."""
        lines = [line for line in self.tail().splitlines() if line.startswith(_ERROR)]
        if lines:
            return lines[-1].removeprefix(_ERROR)[:MAX_ERROR_CHARS]
        if self._process.returncode == -signal.SIGKILL or any(words in self.tail() for words in _NO_MEMORY):
            return (
                f"it ran out of memory; a run may take {self.memory >> 20} MiB here "
                "(--training-memory-bytes): use a smaller batch_size, or a shorter prompt"
            )
        return None


def environment(given: Mapping[str, str], limits: ProcessLimits) -> dict[str, str]:
    """Return a run's environment: bounded threads, this package, and no way to a model hub."""
    kept = {name: value for name, value in given.items() if name in _KEPT or name.startswith(_KEPT_PREFIXES)}
    threads = str(limits.num_threads)
    return kept | {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(Path(app.__file__).parent.parent),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",  # the server has the base already
        **({"CUDA_VISIBLE_DEVICES": ""} if limits.device == "cpu" else {}),
    }
