"""Several processes on one directory: numbers distinct and contiguous, nothing lost."""

import subprocess
import sys
from pathlib import Path

from app.store.prompt_store import open_store

PROCESSES, EACH = 4, 8
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
    store.move_alias("t", "live", version.version, who=str(worker))
    assert store.resolve(f"t@{version.version}") == version
    print(version.version, flush=True)
"""


def test_processes_publish_to_one_task_at_once(root: Path) -> None:
    repository = Path(__file__).parents[2]
    publishers = [
        subprocess.Popen(
            [sys.executable, "-c", PUBLISHER, str(root), str(worker), str(EACH)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=repository,
        )
        for worker in range(PROCESSES)
    ]
    for publisher in publishers:
        assert publisher.stdout is not None
        assert publisher.stdout.readline() == "ready\n"
    for publisher in publishers:
        assert publisher.stdin is not None
        publisher.stdin.write("go\n")
        publisher.stdin.flush()
    claimed: list[int] = []
    for publisher in publishers:
        out, _ = publisher.communicate(timeout=60)
        assert publisher.returncode == 0
        claimed += [int(line) for line in out.split()]
    assert sorted(claimed) == list(range(1, PROCESSES * EACH + 1))
    history = open_store(root).history("t")
    assert [version.version for version in history.versions] == sorted(claimed)
    assert len({version.notes for version in history.versions}) == len(claimed)
    assert len(history.releases) == len(claimed)
    assert len(list((root / "blobs").iterdir())) == EACH
