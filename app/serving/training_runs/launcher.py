"""Run a command as a training run's process: `launcher PARENT MEMORY COMMAND...`.

It is a program of its own, since a process with threads can do next to nothing between fork and exec. Of
what it sets, all outlives the exec. It needs the standard library alone, so it starts in an instant.
"""

import contextlib
import ctypes
import os
import resource
import signal
import sys

MAX_FILE_BYTES = 1 << 30  # that a run may write into one file
_PR_SET_PDEATHSIG = 1


def launch(parent: int, memory: int, command: list[str]) -> None:
    """Become `command`: of the lowest priority, bounded, first to go when memory is short, never orphaned.

    `parent` is the process that must not end before it; `memory` bounds its private memory, in bytes.
    """
    _die_with(parent)
    _yield_to_all()
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_BYTES, MAX_FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    os.execv(command[0], command)


def _die_with(parent: int) -> None:
    """Ask the kernel to kill this process when the thread that started it ends, with its process or not."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it has ended before it was asked for
        sys.exit(1)


def _yield_to_all() -> None:
    """Run only where a core would be idle, as far as the system allows."""
    os.nice(19)
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


if __name__ == "__main__":
    launch(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
