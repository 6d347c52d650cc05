"""What ten thousand tasks cost who doesn't ask for them: ``python -m benchmarks.ten_thousand_tasks``.

A server of the demo base stands on a store of ten tasks, then on one of ten thousand, and is asked for the
same over HTTP. One task of the large store has a thousand versions; what the next one costs stands beside
the first of a new task. The stores are written without syncing; what is timed is synced.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx2

from app.prompt import VersionDraft
from app.store.disk import Disk
from app.store.files import DurableFiles
from app.store.prompt_store import PromptStore, open_store
from benchmarks.registered_tasks import publish_task, task_id
from benchmarks.serve_process import serving

FEW = 10
MANY_VERSIONS = "many-versions"
PATHS = ("/tasks?limit=100", "/health", "/v1/models")
MODELS_BAR = 100.0  # milliseconds for all of /v1/models
_REPEATS = 12
_TIMEOUT = 120.0


class _Unsynced(Disk):
    """For stores that are made to be measured."""

    def sync(self, descriptor: int) -> None:
        """Not at all."""


def fill(root: Path, tasks: int, versions: int) -> None:
    """Text tasks with a version each, and one with many."""
    store = PromptStore(DurableFiles(root, _Unsynced()))
    for number in range(tasks):
        publish_task(store, task_id(number), VersionDraft(prompt=None, template=f"{number}: {{text}}"))
    for number in range(versions):
        publish_task(store, MANY_VERSIONS, VersionDraft(prompt=None, template=f"{number}: {{text}}"))


def milliseconds(work: Callable[[], object]) -> float:
    """How long it took."""
    begin = time.perf_counter()
    work()
    return round((time.perf_counter() - begin) * 1e3, 2)


def serve_and_ask(root: Path, model: Path) -> dict[str, Any]:
    """Seconds until ready, memory, and what each path costs."""
    begin = time.monotonic()
    with serving(root / "log", {"model": model, "store": root / "store"}) as server:
        result: dict[str, Any] = {"ready_seconds": round(time.monotonic() - begin, 2)}
        with httpx2.Client(trust_env=False, timeout=_TIMEOUT) as client:
            for path in PATHS:
                result[path] = _ask(client, f"{server.url}{path}")
        return result | {"rss_bytes": server.process.memory_info().rss}


def _ask(client: httpx2.Client, url: str) -> dict[str, Any]:
    """Half of the repeats come after a pause in which what other replicas do has to be looked for again."""
    answer = client.get(url)
    first = round(answer.raise_for_status().elapsed.total_seconds() * 1e3, 2)
    again, paused = [], []
    for _ in range(_REPEATS):
        again.append(milliseconds(lambda: client.get(url)))
        time.sleep(1.1)
        paused.append(milliseconds(lambda: client.get(url)))
    return {
        "first_ms": first,
        "median_ms": statistics.median(again),
        "after_a_pause_ms": statistics.median(paused),
        "worst_ms": max(again + paused),
        "bytes": len(answer.content),
    }


def publishing(root: Path) -> dict[str, float]:
    """Median milliseconds of a publication: the first of a task, and the next one of the task with many."""
    store = open_store(root)
    store.publish(MANY_VERSIONS, VersionDraft(prompt=None, template="read all of them once: {text}"))

    def publish(name: str, number: int) -> float:
        draft = VersionDraft(prompt=None, template=f"new {number}: {{text}}")
        return milliseconds(lambda: publish_task(store, name, draft))

    pairs = [(publish(f"new-{n}", n), publish(MANY_VERSIONS, n)) for n in range(_REPEATS)]
    first, next_one = (round(statistics.median(times), 2) for times in zip(*pairs, strict=True))
    return {"first_version_ms": first, "next_of_many_ms": next_one}


def run(tasks: int, versions: int, model: Path) -> dict[str, Any]:
    """Both stores, one after the other."""
    result: dict[str, Any] = {"tasks": tasks, "versions": versions}
    with tempfile.TemporaryDirectory() as folder:
        for name, count in (("few", FEW), ("many", tasks)):
            root = Path(folder) / name
            root.mkdir()
            print(f"a store of {count} tasks", file=sys.stderr, flush=True)
            fill(root / "store", count, versions if name == "many" else 0)
            result[name] = serve_and_ask(root, model)
        result["publishing"] = publishing(Path(folder) / "many" / "store")
    return result | {"load_average": os.getloadavg()[0], "cpus": os.cpu_count()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the options, run, print and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ten_thousand_tasks", description=__doc__)
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--versions", type=int, default=1000)
    parser.add_argument("--model", type=Path, default=Path("demo/demo-causal"))
    parser.add_argument("--out", type=Path, default=Path("build/bench/ten-thousand-tasks.json"))
    options = parser.parse_args(arguments)
    result = run(options.tasks, options.versions, options.model)
    text = json.dumps(result, indent=2)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text + "\n")
    print(text)
    slowest = result["many"]["/v1/models"]["after_a_pause_ms"]
    print(f"/v1/models of {options.tasks} tasks: {slowest} ms (at most {MODELS_BAR})")


if __name__ == "__main__":
    main()
