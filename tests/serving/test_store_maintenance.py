"""The store is looked after whatever goes wrong before."""

import logging
from pathlib import Path

import pytest

from app.prompt import TaskVersion, VersionDraft
from app.serving.store_maintenance import StoreMaintenance
from app.store.prompt_store import open_store
from tests.waiting import wait_until


def test_rounds_begin_though_the_report_of_tasks_failed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(tmp_path)
    version, _ = store.publish("t", VersionDraft(prompt=None, template="a {x}"))
    store.move_alias("t", "live", version.version)
    store.history("t")  # in memory, so that the round can mend the file
    manifest = tmp_path / "tasks" / "t" / "versions" / "1.json"
    good = manifest.read_bytes()
    manifest.write_bytes(b"{")

    def why_not(version: TaskVersion) -> str | None:
        raise ArithmeticError("unforeseen")

    upkeep = StoreMaintenance(store, lambda digest: b"", why_not)
    with caplog.at_level(logging.INFO):
        upkeep.start()
        wait_until(lambda: manifest.read_bytes() == good)
    upkeep.stop()
    assert "the tasks can't be listed" in caplog.text
