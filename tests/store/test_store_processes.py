"""Several processes on one directory: numbers distinct and contiguous, nothing lost."""

import subprocess
import sys
from pathlib import Path

from app.prompt import VersionDraft
from app.store.prompt_store import open_store

PROCESSES, EACH = 8, 25
PUBLISHER = """
import sys
from pathlib import Path
from app.prompt import VersionDraft
from app.store.prompt_store import open_store
from tests.store.builders import soft

root, worker, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
store = open_store(root)
print("ready", flush=True)
sys.stdin.readline()
for step in range(count):
    draft = VersionDraft(prompt=soft(seed=step), notes=f"{worker}-{step}")
    version, created = store.publish("t", draft)
    assert created
    store.move_alias("t", "live", version.version, who=str(worker), why=str(step))
    assert store.resolve(f"t@{version.version}") == version
    print(version.version, flush=True)
"""


MOVER = """
import sys
from pathlib import Path
from app.errors import Conflict
from app.store.prompt_store import open_store

root, worker, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
store = open_store(root)
print("ready", flush=True)
sys.stdin.readline()
won = 0
while won < count:
    history = store.history("t")
    last = len(history.releases)
    target = history.aliases.get("live", 0) % 8 + 1  # never what the alias means now
    try:
        release = store.move_alias("t", "live", target, expected_release=last, who=str(worker))
    except Conflict:
        continue
    if release.number == last + 1:
        print(release.number, flush=True)
        won += 1
"""


def run_together(script: str, root: Path, each: int) -> list[list[int]]:
    """Start all, let them go at once; the numbers that each printed."""
    repository = Path(__file__).parents[2]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(root), str(worker), str(each)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=repository,
        )
        for worker in range(PROCESSES)
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    printed: list[list[int]] = []
    for worker in workers:
        out, _ = worker.communicate(timeout=120)
        assert worker.returncode == 0
        printed.append([int(line) for line in out.split()])
    return printed


def test_processes_publish_to_one_task_at_once(root: Path) -> None:
    claimed = sorted(number for numbers in run_together(PUBLISHER, root, EACH) for number in numbers)
    assert claimed == list(range(1, PROCESSES * EACH + 1))
    store = open_store(root)
    history = store.history("t")
    assert [version.version for version in history.versions] == claimed
    assert len({version.notes for version in history.versions}) == len(claimed)
    assert len(history.releases) == len(claimed)
    for version in history.versions:
        assert version.prompt_digest is not None
        store.read_blob(version.prompt_digest)
    assert len(list((root / "blobs").iterdir())) == EACH


def test_one_winner_per_release(root: Path) -> None:
    store = open_store(root)
    for number in range(8):
        store.publish("t", VersionDraft(prompt=None, template="{x}", notes=str(number)))
    won = run_together(MOVER, root, 10)
    numbers = sorted(number for each in won for number in each)
    assert numbers == list(range(1, 8 * 10 + 1)), "each release has one winner, and none is missing"
    for worker, each in enumerate(won):
        for number in each:
            assert store.history("t").releases[number - 1].who == str(worker)
