"""Memory of this machine, or of the container that limits this process."""

import os
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")
# Control groups v2 and v1: where they are, the limit, what is used, and the part of it that the kernel
# gives back first (page cache that was not read again, such as a model's files).
_CGROUPS = (
    ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def host_memory(root: Path = _ROOT) -> tuple[int, int]:
    """Return the bytes there are, and those that could be had now without swapping; limits count.

    `root` is the file system's.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = root / "proc/meminfo"
    free = _fields(meminfo)["MemAvailable:"] * 1024 if meminfo.is_file() else total // 2  # not Linux
    for limit, used in _limits(root):
        total, free = min(total, limit), min(free, max(0, limit - used))
    return total, free


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """Yield each control group's limit and what of it is in use, in bytes."""
    for folder, limit, used, cached in _CGROUPS:
        group = root / folder
        try:
            found = int((group / limit).read_text()), int((group / used).read_text())
        except (OSError, ValueError):  # not there, or no limit ("max")
            continue
        yield found[0], found[1] - _fields(group / "memory.stat").get(cached, 0)


def _fields(file: Path) -> dict[str, int]:
    """Return the numbers of a file of lines such as `name 123 kB`."""
    lines = (line.split() for line in file.read_text().splitlines())
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}
