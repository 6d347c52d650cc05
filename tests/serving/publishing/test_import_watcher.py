"""A PEFT directory that appears in a folder becomes a version; what is refused is said and left alone."""

import json
import logging
import shutil
from pathlib import Path

import pytest

from app.errors import StoreFull
from app.serving.generation_request import GenerationRequest
from app.serving.publishing.import_watcher import MAX_FILES, ImportWatcher
from tests.oracle import greedy, soft_config
from tests.serving.stack import Stack, run


def look(folder: ImportWatcher, times: int = 2) -> None:
    for _ in range(times):
        run(folder.scan())


def test_what_is_dropped_in_is_served(stack: Stack, tmp_path: Path) -> None:
    watched = tmp_path / "in"
    watched.mkdir()
    folder = ImportWatcher(watched, stack.publishing)
    look(folder)
    model, weights, config = stack.adapter(soft_config(4), tmp_path / "peft")
    directory = watched / "dropped"
    directory.mkdir()
    (directory / "adapter_config.json").write_bytes(config)
    (directory / "adapter_model.safetensors").write_bytes(weights[:100])
    look(folder, times=1)
    (directory / "adapter_model.safetensors").write_bytes(weights)  # the copy was still under way
    look(folder, times=1)
    assert "dropped" not in stack.store.list_tasks()
    look(folder, times=1)
    result = run(stack.generation.generate(GenerationRequest(inputs="the film", task="dropped")))
    expected = greedy(model, stack.tokenizer("the film")["input_ids"], len(result.tokens)).tokens
    assert [token.id for token in result.tokens] == expected
    assert result.version is not None
    assert result.version.provenance["uploader"] == "import-dir"


def test_a_restart_imports_nothing_twice_and_moves_nothing_back(stack: Stack, tmp_path: Path) -> None:
    directory = tmp_path / "restarted"
    directory.mkdir()
    for number in (1, 2):
        (directory / "task.json").write_text(json.dumps({"template": f"{number} {{x}}"}))
        look(ImportWatcher(tmp_path, stack.publishing))
    assert stack.store.resolve("restarted").version == 2
    run(stack.publishing.change(lambda store: store.rollback("restarted")))
    look(ImportWatcher(tmp_path, stack.publishing), times=3)
    assert stack.store.resolve("restarted").version == 1
    assert len(stack.store.history("restarted").versions) == 2


def test_a_change_is_another_version(stack: Stack, tmp_path: Path) -> None:
    folder = ImportWatcher(tmp_path, stack.publishing)
    directory = tmp_path / "changing"
    directory.mkdir()
    for number in (1, 2, 3):
        (directory / "task.json").write_text(json.dumps({"template": f"{'x' * number} {{x}}"}))
        look(folder, times=3)
        assert stack.store.resolve("changing").version == number


def test_what_is_refused_is_said_once(stack: Stack, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = tmp_path / "bad"
    directory.mkdir()
    (directory / "adapter_model.safetensors").write_bytes(b"not a safetensors file")
    (tmp_path / "link").symlink_to(directory)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "file.txt").write_text("not a directory")
    folder = ImportWatcher(tmp_path, stack.publishing)
    with caplog.at_level(logging.WARNING):
        look(folder, times=5)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["bad was not imported"]
    assert "bad" not in stack.store.list_tasks()
    shutil.rmtree(tmp_path / "bad")
    look(folder)


def test_a_folder_that_is_gone_is_not_the_end(
    stack: Stack, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = ImportWatcher(tmp_path / "nothing", stack.publishing)
    look(folder)
    assert "can't be read" in caplog.text


@pytest.mark.parametrize("task", ["[" * 200_000, json.dumps({"template": "\ud800 {x}"}), "{", "[]"])
def test_one_odd_directory_stops_nothing(
    stack: Stack, tmp_path: Path, caplog: pytest.LogCaptureFixture, task: str
) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "task.json").write_text(task)
    (tmp_path / "fine").mkdir()
    (tmp_path / "fine" / "task.json").write_text(json.dumps({"template": f"fine {len(task)} {{x}}"}))
    with caplog.at_level(logging.WARNING):
        look(ImportWatcher(tmp_path, stack.publishing))
    assert "odd was not imported" in caplog.text
    assert "fine" in stack.store.list_tasks()


def test_what_may_pass_is_tried_again(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "patient").mkdir()
    (tmp_path / "patient" / "task.json").write_text(json.dumps({"template": "patient {x}"}))
    folder = ImportWatcher(tmp_path, stack.publishing)
    publish = stack.store.publish

    def full(*_: object) -> None:
        raise StoreFull("the disk is full")

    monkeypatch.setattr(stack.store, "publish", full)
    with caplog.at_level(logging.WARNING):
        look(folder, times=5)
    assert len([record for record in caplog.records if "patient" in record.getMessage()]) == 1
    monkeypatch.setattr(stack.store, "publish", publish)
    look(folder)
    assert "patient" in stack.store.list_tasks()


def test_a_directory_must_have_a_tasks_name(
    stack: Stack, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "My Task").mkdir()
    (tmp_path / "My Task" / "task.json").write_text(json.dumps({"template": "{x}"}))
    with caplog.at_level(logging.WARNING):
        look(ImportWatcher(tmp_path, stack.publishing))
    assert "A task id is" in caplog.text


def test_a_crowded_directory_is_left_alone(
    stack: Stack, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "crowded").mkdir()
    (tmp_path / "crowded" / "task.json").write_text(json.dumps({"template": "crowded {x}"}))
    for number in range(MAX_FILES):
        (tmp_path / "crowded" / f"{number}.txt").touch()
    with caplog.at_level(logging.WARNING):
        look(ImportWatcher(tmp_path, stack.publishing), times=4)
    assert [record.getMessage() for record in caplog.records] == [
        f"crowded was not imported: it holds more than {MAX_FILES} files; leave in it what is to be imported"
    ]


def test_what_never_stays_still_is_never_imported(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "restless").mkdir()
    folder = ImportWatcher(tmp_path, stack.publishing)
    for number in range(6):
        (tmp_path / "restless" / "task.json").write_text(json.dumps({"template": f"{number * 'x'} {{x}}"}))
        look(folder, times=1)
    assert "restless" not in stack.store.list_tasks()
    look(folder, times=1)
    assert stack.store.resolve("restless").version == 1
