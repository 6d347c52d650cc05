"""The store is looked after whatever goes wrong before."""

import logging
from pathlib import Path

import pytest

from app.prompt import TaskVersion, VersionDraft
from app.serving.store_maintenance import StoreMaintenance
from app.store.prompt_store import open_store
from app.store.traffic_split import EnsembleTarget
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


def test_a_task_of_several_versions_is_reported_where_one_cannot_be_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(tmp_path)
    for task, target in (("split", {1: 9, 2: 1}), ("together", EnsembleTarget({1: 9, 2: 1}))):
        for template in ("a {x}", "b {x}"):
            store.publish(task, VersionDraft(prompt=None, template=template))
        store.move_alias(task, "live", target)
    upkeep = StoreMaintenance(store, lambda digest: b"", lambda each: "odd" if each.version == 2 else None)
    with caplog.at_level(logging.INFO):
        upkeep.start()
        wait_until(lambda: "0 tasks can be served" in caplog.text)
    upkeep.stop()
    assert "task split can't be served: odd" in caplog.text
    assert "task together can't be served: odd" in caplog.text
