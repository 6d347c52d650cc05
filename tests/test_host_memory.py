"""One reader of memory: the machine's, or less where a control group limits this process."""

from pathlib import Path

import pytest

from app.host_memory import host_memory

GIB = 1 << 30


def tree(root: Path, **files: str) -> Path:
    """A file system with a machine of which 8 GiB are free."""
    files = {"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable:    {8 << 20} kB\n"} | files
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_without_a_limit_it_is_the_machines(tmp_path: Path) -> None:
    machine, _ = host_memory()
    assert host_memory(tree(tmp_path)) == (machine, 8 * GIB)
    unlimited = {"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.current": "1\n"}
    assert host_memory(tree(tmp_path, **unlimited)) == (machine, 8 * GIB)


@pytest.mark.parametrize(
    ("folder", "limit", "used", "cached"),
    [
        ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_a_control_group_limits_both_and_its_page_cache_is_free(
    tmp_path: Path, folder: str, limit: str, used: str, cached: str
) -> None:
    files = {f"{folder}/{limit}": f"{GIB}\n", f"{folder}/{used}": f"{GIB // 2}\n"}
    files[f"{folder}/memory.stat"] = f"anon 5\n{cached} {GIB // 4}\n"
    assert host_memory(tree(tmp_path, **files)) == (GIB, 3 * GIB // 4)
    files[f"{folder}/{used}"] = f"{2 * GIB}\n"
    assert host_memory(tree(tmp_path, **files)) == (GIB, 0)
