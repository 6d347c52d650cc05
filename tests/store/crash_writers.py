"""Writers that are killed: a script, so that its children are forked from a small process.

    python -m tests.store.crash_writers ROOT KILLS WRITERS SEED

Each round forks so many writers, which publish and release versions of one task until SIGKILL strikes one
at a point of its own. A writer tells what was acknowledged through a pipe, which survives it.
After each round the store must show everything that was acknowledged, whole, and go on.
"""

import json
import os
import random
import signal
import sys
from collections import Counter
from pathlib import Path

from app.prompt import VersionDraft
from app.store.files import DurableFiles
from app.store.prompt_store import PromptStore, open_store
from tests.store.builders import soft
from tests.store.faulty_disks import Countdown, WatchedDisk, killing_disk

TASK = "t"


def publish(store: PromptStore, notes: str, seed: int) -> tuple[int, int]:
    version, _ = store.publish(TASK, VersionDraft(prompt=soft(seed=seed), notes=notes))
    return version.version, store.move_alias(TASK, "live", version.version).number


def points_of_a_publish(root: Path) -> int:
    """How many points one publish has on a new task."""
    countdown = Countdown(0, lambda: None)
    publish(PromptStore(DurableFiles(root, WatchedDisk(countdown))), "count", 0)
    return countdown.count


def start_writer(root: Path, name: str, kill_at: int) -> tuple[int, int]:
    """Fork a writer; its process id, and where its acknowledgements can be read."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    try:
        os.close(reading)
        store = PromptStore(DurableFiles(root, killing_disk(kill_at)))
        for count in range(1000):
            number, release = publish(store, f"{name}-{count}", seed=random.randrange(4))
            os.write(writing, f"{json.dumps([number, release, f'{name}-{count}'])}\n".encode())
    finally:
        os._exit(1)  # a writer that was never killed is an error


def acknowledged(reading: int) -> list[tuple[int, int, str]]:
    with os.fdopen(reading) as lines:
        return [tuple(json.loads(line)) for line in lines]  # type: ignore[misc]


def check(root: Path, expected: dict[int, str], releases: dict[int, int]) -> None:
    """What the next start of a server finds."""
    store = open_store(root)
    history = store.history(TASK)
    assert [version.version for version in history.versions] == list(range(1, len(history.versions) + 1))
    for version in history.versions:
        assert version.prompt_digest is not None
        store.read_blob(version.prompt_digest)
    for number, notes in expected.items():
        assert history.versions[number - 1].notes == notes, "an acknowledged version is lost"
    for number, version_number in releases.items():
        assert history.releases[number - 1].aliases["live"] == version_number, (
            "an acknowledged release is lost"
        )
    assert store.resolve(TASK).version == history.releases[-1].aliases["live"]


def main(root: Path, kills: int, writers: int, seed: int) -> None:
    random.seed(seed)
    num_points = points_of_a_publish(root / "count")
    struck: Counter[int] = Counter()
    expected: dict[int, str] = {}
    releases: dict[int, int] = {}
    while struck.total() < kills:
        # Every point in turn; of several writers the others strike anywhere.
        first = struck.total() % num_points + 1
        store = root / f"store-{struck.total() // (2 * num_points)}"  # a fresh one now and then
        if not store.exists():
            expected, releases = {}, {}
            number, release = publish(open_store(store), "start", 0)
            expected[number], releases[release] = "start", number
        ats = [first, *(random.randint(1, 3 * num_points) for _ in range(writers - 1))]
        started = [start_writer(store, f"{struck.total()}-{index}", at) for index, at in enumerate(ats)]
        for child, reading in started:
            for number, release, notes in acknowledged(reading):
                expected[number], releases[release] = notes, number
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        for at in ats:
            struck[at] += 1
        check(store, expected, releases)
        number, release = publish(open_store(store), f"after-{struck.total()}", seed=9)
        expected[number], releases[release] = f"after-{struck.total()}", number
        check(store, expected, releases)
    report = {"kills": struck.total(), "points": num_points, "points_struck": len(struck)}
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(argument) for argument in sys.argv[2:5]))
