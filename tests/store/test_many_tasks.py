"""What is asked of a store of many tasks costs what is asked for: calls are counted, not time."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from app.errors import NotFound
from app.prompt import VersionDraft
from app.store.disk import Disk
from app.store.files import DurableFiles, Name, Stamp
from app.store.history import HistoryReader
from app.store.manifests import decode_version, encode_version, version_of
from app.store.prompt_store import PromptStore, open_store
from app.store.releases import MOVE, Change, TaskHistory, encode_release, next_release

MANY = 1000


class Unsynced(Disk):
    def sync(self, descriptor: int) -> None:
        pass


class CountingFiles(DurableFiles):
    """Counts what is asked of the file system."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, Unsynced())
        self.calls: Counter[str] = Counter()

    def read(self, name: Name, limit: int) -> bytes | None:
        self.calls["read"] += 1
        return super().read(name, limit)

    def exists(self, name: Name) -> bool:
        self.calls["exists"] += 1
        return super().exists(name)

    def names(self, name: Name) -> list[str]:
        self.calls["names"] += 1
        return super().names(name)

    def stamp(self, name: Name) -> Stamp | None:
        self.calls["stamp"] += 1
        return super().stamp(name)

    def put_if_absent(self, name: Name, data: bytes) -> bool:
        self.calls["put"] += 1
        return super().put_if_absent(name, data)

    def count(self, work: Any) -> Counter[str]:
        self.calls.clear()
        work()
        return +self.calls


def text(template: str) -> VersionDraft:
    return VersionDraft(prompt=None, template=template)


def publish(store: PromptStore, task: str, number: int) -> None:
    version, _ = store.publish(task, text(f"{number} {{x}}"))
    store.move_alias(task, "live", version.version)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("many")
    for number in range(MANY):
        write_task(root, f"task-{number:05}", text(f"{number} {{x}}"))
    return root


def write_task(root: Path, task: str, draft: VersionDraft) -> None:
    """As a store of before left it: a version that is live."""
    manifest = encode_version(version_of(task, 1, draft))
    history = TaskHistory(task, (decode_version(task, 1, manifest),))
    release = encode_release(next_release(history, Change(action=MOVE, alias="live", target=1)))
    for folder, data in (("versions", manifest), ("releases", release)):
        (root / "tasks" / task / folder).mkdir(parents=True)
        (root / "tasks" / task / folder / "1.json").write_bytes(data)


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the last change lay long back."""
    monkeypatch.setattr("app.store.files.TICK_SECONDS", -3600.0)


def test_ids_cost_one_look(many: Path, settled: None) -> None:
    files = CountingFiles(many)
    store = PromptStore(files)
    assert len(store.list_tasks()) == MANY
    assert files.count(store.list_tasks) == {"stamp": 1}
    first = store.histories.task_ids()
    assert store.histories.task_ids() is first


def test_an_alias_costs_one_look(many: Path) -> None:
    files = CountingFiles(many)
    store = PromptStore(files)
    store.resolve("task-00007")
    assert files.count(lambda: store.alias_versions("task-00007", "live")) == {"exists": 1}
    assert files.count(lambda: store.resolve("task-00007")) == {"exists": 1}


def test_publishing_costs_the_same_however_many_versions_there_are(tmp_path: Path) -> None:
    files = CountingFiles(tmp_path)
    store = PromptStore(files)
    costs = [files.count(lambda n=number: publish(store, "t", n)) for number in range(200)]  # type: ignore[misc]
    assert costs[-1] == costs[1]
    settings = Counter[str]()

    def count_settings(version: Any) -> Any:
        settings["read"] += 1
        return real(version)

    from app.store import history

    real = history.settings_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "settings_of", count_settings)
        publish(store, "t", 200)
        assert store.publish("t", text("7 {x}"))[0].version == 8
    assert settings["read"] <= 2, "no version is looked into twice"


def test_new_and_removed_tasks_of_others_are_seen_at_once(tmp_path: Path) -> None:
    """With the real clock: right after a change, and whatever time passes between two."""
    ours, other = open_store(tmp_path), open_store(tmp_path)
    assert ours.list_tasks() == []
    for number in range(30):
        publish(other, f"t{number}", 1)
        assert len(ours.list_tasks()) == number + 1
    (tmp_path / "tasks" / "t7").rename(tmp_path / "away")
    assert "t7" not in ours.list_tasks()


def test_a_folder_that_becomes_a_task_is_seen(tmp_path: Path, settled: None) -> None:
    """Its mkdir changes the listing, its first record doesn't."""
    (tmp_path / "tasks" / "late" / "versions").mkdir(parents=True)
    ours = open_store(tmp_path)
    assert ours.list_tasks() == []
    open_store(tmp_path).publish("late", text("{x}"))
    assert ours.list_tasks() == ["late"]


def test_histories_in_memory_are_bounded_and_aliases_stay(many: Path) -> None:
    files = CountingFiles(many)
    store = PromptStore(files)
    store.histories = HistoryReader(files, max_records=100)
    for number in range(60):
        store.resolve(f"task-{number:05}")
    assert len(store.histories.cached_ids()) == 50
    assert files.count(lambda: store.resolve("task-00000")) == {"exists": 1}
    assert store.resolve("task-00000@1").template == "0 {x}"
    assert store.history("task-00001").versions[0].template == "1 {x}"
    publish(store, "task-00001", 5000)
    assert store.resolve("task-00001").version == 2
    assert store.publish("task-00001", text("1 {x}"))[0].version == 1
    assert open_store(many).resolve("task-00001").version == 2
    with pytest.raises(NotFound):
        store.resolve("task-00002@9")
