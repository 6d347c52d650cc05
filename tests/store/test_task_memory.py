"""Bytes of Python's objects for a registered task, whose records are kept in memory."""

import gc
import tracemalloc
from pathlib import Path

import pytest

from app.prompt import VersionDraft
from app.store.disk import Disk
from app.store.files import DurableFiles
from app.store.prompt_store import PromptStore, open_store
from tests.store.builders import soft

PROVENANCE = {"format": "peft", "sha256": "5" * 64, "base_fingerprint": "f" * 64, "uploader": "someone"}


class _Unsynced(Disk):
    def sync(self, descriptor: int) -> None:
        """Not at all: these stores are made to be measured."""


def bytes_of_a_task(root: Path, count: int) -> float:
    """Traced bytes of each of `count` tasks in a store that was read anew."""
    store, prompt = PromptStore(DurableFiles(root, _Unsynced())), soft()
    for number in range(count):
        draft = VersionDraft(prompt=prompt, template=f"{number}: {{inputs}}", provenance=PROVENANCE)
        version, _ = store.publish(f"task-{number}", draft)
        store.move_alias(f"task-{number}", "live", version.version)
    tracemalloc.start()
    try:
        store = open_store(root)
        store.read_ahead()
        gc.collect()
        assert len(store.histories.cached_ids()) == count
        return tracemalloc.get_traced_memory()[0] / count
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("count", [1_000, pytest.param(10_000, marks=pytest.mark.soak)])
def test_a_registered_task_takes_a_few_kilobytes(tmp_path: Path, count: int) -> None:
    assert bytes_of_a_task(tmp_path / "store", count) < 4_000
