"""Runs of a server: one at a time, the others wait; what one makes is published like an upload."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.errors import NotFound, RateLimited, StoreFull, Unavailable
from app.serving.training_runs.process import ProcessLimits
from app.serving.training_runs.rows import run_detail
from app.serving.training_runs.run_files import MAX_KEPT, RunDirectory
from app.serving.training_runs.service import MAX_UNFINISHED, MAX_UNFINISHED_OF_KEY
from tests.oracle import as_prompt, soft_config, tuned
from tests.serving.stack import Stack
from tests.serving.training_runs.child import METRICS
from tests.serving.training_runs.runs import Runs, a_record, running_runs
from tests.waiting import wait_until


@pytest.fixture
def runs(stack: Stack, tmp_path: Path) -> Iterator[Runs]:
    with running_runs(stack, tmp_path / "runs") as service:
        yield service


@pytest.fixture(scope="module")
def prompt(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A prompt as a run leaves it."""
    folder = tmp_path_factory.mktemp("prompt")
    model = tuned(stack.base, soft_config(4), seed=1)
    path = folder / "prompt.safetensors"
    path.write_bytes(as_prompt(model, folder / "peft").data)
    return str(path)


def test_a_run_becomes_a_candidate(runs: Runs, stack: Stack, prompt: str) -> None:
    runs.plans["first-candidate"] = {"prompt": prompt, "reports": True}
    run_id = runs.start("first-candidate")
    record = runs.wait("first-candidate", run_id)
    assert (record.state, record.error) == ("done", None)
    version = stack.store.resolve("first-candidate@candidate")
    assert record.published is not None
    assert record.published["version_digest"] == f"sha256:{version.digest}"
    assert version.provenance["uploader"] == "ada"
    assert version.provenance["metrics"] == {"exact": 0.75}
    with pytest.raises(NotFound):
        stack.store.resolve("first-candidate")  # nothing is live before somebody says so
    detail = run_detail(runs, record)
    assert detail["curves"]["loss"] == {"steps": [1, 2, 3, 4], "values": [1, 1 / 2, 1 / 3, 1 / 4]}
    assert detail["curves"]["dev exact"] == {"steps": [4], "values": [0.75]}
    assert (detail["step"], detail["steps"], detail["tokens_per_second"]) == (4, 4, 100)
    assert (detail["best_step"], detail["best_scores"]) == (4, {"exact": 0.75})
    assert detail["advice"] == ["the loss still falls: try more steps"]
    assert detail["result"] == {name: METRICS[name] for name in ("main_metric", "test")}
    assert not (runs.directory.output(run_id).parent / "data").exists(), "clients' data doesn't stay"


def test_a_run_need_not_be_published(runs: Runs, stack: Stack, prompt: str) -> None:
    runs.plans["kept"] = {"prompt": prompt}
    record = runs.wait("kept", runs.start("kept", publish=False))
    assert (record.state, record.published) == ("done", None)
    with pytest.raises(NotFound):
        stack.store.history("kept")


def test_what_the_base_refuses_is_not_published(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"no tensors")
    runs.plans["bad"] = {"prompt": str(tmp_path / "bad")}
    record = runs.wait("bad", runs.start("bad"))
    assert record.state == "failed"
    assert (record.error or "").startswith("it was trained, but not published: ")


def test_a_run_fails_in_one_line(runs: Runs) -> None:
    runs.plans["wrong"] = {"error": "data.jsonl, line 3: label is empty"}
    record = runs.wait("wrong", runs.start("wrong"))
    assert (record.state, record.error) == ("failed", "data.jsonl, line 3: label is empty")


def test_an_unexpected_end_names_no_path(runs: Runs, caplog: pytest.LogCaptureFixture) -> None:
    runs.plans["odd"] = {"raises": True}
    record = runs.wait("odd", runs.start("odd"))
    assert (
        record.error == "the training process ended unexpectedly; the server's log has the end of its output"
    )
    assert "RuntimeError" in caplog.text


def test_a_command_that_fails_ends_its_run_alone(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(runs, "_command", lambda run: ["/no/such/program"])
        assert runs.wait("a", runs.start("a")).state == "failed"
    assert runs.wait("b", runs.start("b", publish=False)).state == "done"


def test_one_goes_on_and_the_others_wait(runs: Runs, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    runs.plans["first"] = {"gate": str(gate)}
    first = runs.start("first", publish=False)
    runs.wait("first", first, "running")
    second, third = (runs.start("later", publish=False) for _ in range(2))
    assert (runs.position(first), runs.position(second), runs.position(third)) == (None, 1, 2)
    runs.cancel(runs.directory.record("later", second))
    assert runs.directory.record("later", second).state == "cancelled"
    assert runs.position(third) == 1
    gate.touch()
    assert runs.wait("first", first).state == "done"
    assert runs.wait("later", third).state == "done"


def test_a_run_is_cancelled_by_any_replica(runs: Runs, stack: Stack, tmp_path: Path) -> None:
    runs.plans["long"] = {"gate": str(tmp_path / "never")}
    run_id = runs.start("long")
    runs.wait("long", run_id, "running")
    with running_runs(stack, tmp_path / "runs") as other:
        other.cancel(other.directory.record("long", run_id))
        assert other.wait("long", run_id).state == "cancelled"


def test_cancelling_what_has_ended_changes_nothing(runs: Runs) -> None:
    record = runs.wait("over", runs.start("over", publish=False))
    runs.cancel(record)
    assert runs.directory.record("over", record.id) == record


def test_the_queue_and_a_keys_share_of_it_are_bounded(runs: Runs, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    runs.plans["busy"] = {"gate": str(gate)}
    started = [runs.start("busy", "ada", publish=False) for _ in range(MAX_UNFINISHED_OF_KEY)]
    with pytest.raises(RateLimited, match="This key has 2 training runs"), runs.place("ada"):
        pass
    started += [runs.start("busy", publish=False) for _ in range(MAX_UNFINISHED - MAX_UNFINISHED_OF_KEY)]
    with pytest.raises(RateLimited, match="5 training runs wait or run"), runs.place("bob"):
        pass
    gate.touch()
    assert {runs.wait("busy", run_id).state for run_id in started} == {"done"}
    for _ in range(2 * MAX_UNFINISHED):  # an upload that came to nothing gives its place back
        with runs.place("ada"):
            pass


def test_a_server_that_ends_ends_its_runs(stack: Stack, tmp_path: Path) -> None:
    with running_runs(stack, tmp_path / "runs") as runs:
        runs.plans["cut"] = {"gate": str(tmp_path / "never"), "is_stubborn": True}
        ids = [runs.start("cut"), runs.start("cut")]
        runs.wait("cut", ids[0], "running")
        wait_until((runs.directory.output(ids[0]) / "facts.json").exists)
    directory = RunDirectory(tmp_path / "runs")
    assert [directory.record("cut", run_id).state for run_id in ids] == ["interrupted"] * 2


def test_a_killed_servers_runs_were_interrupted(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    run = directory.create(a_record("killed"), lambda folder: (folder / "data.csv").touch())
    run.write(run.record.begun())
    directory.prune()
    assert directory.record("killed", run.record.id).state == "running"
    assert run.data.is_dir()
    os.close(run._lock)  # what the kernel does for a process that dies
    assert directory.record("killed", run.record.id).state == "interrupted"
    directory.prune()
    assert not run.data.exists(), "uploaded data is kept no longer than its run goes on"


def test_the_oldest_runs_go(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    for number in range(MAX_KEPT + 2):
        record = a_record("many", error=f"{number}").ended("done")  # type: ignore[arg-type]
        directory.create(record, lambda folder: None).close()
    held = directory.create(a_record("many"), lambda folder: None)
    directory.prune()
    kept = directory.records("many")
    assert len(kept) == MAX_KEPT + 1
    assert held.record.id in {record.id for record in kept}
    held.close()


def test_a_run_that_cannot_be_stored_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "data.jsonl").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    opened = os.listdir("/proc/self/fd")
    with pytest.raises(StoreFull):
        RunDirectory(tmp_path).create(a_record("full"), fail)
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == len(opened), "its lock is let go"


def test_runs_go_on_where_old_ones_cannot_be_removed(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise Unavailable("The directory of training runs can't be read; try again shortly.")

    monkeypatch.setattr(runs.directory, "prune", fail)
    for _ in range(2):
        assert runs.wait("first", runs.start("first", publish=False)).state == "done"


def test_no_id_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({}))
    directory = RunDirectory(tmp_path / "runs")
    for name in ("..", ".", "", "../run.json", "20260101-000000-00000000/../x"):
        with pytest.raises(NotFound):
            directory.record("any", name)


def test_a_run_of_another_task_is_not_there(runs: Runs) -> None:
    run_id = runs.start("mine", publish=False)
    with pytest.raises(NotFound):
        runs.directory.record("yours", run_id)
    runs.wait("mine", run_id)


def test_half_of_the_free_memory_is_the_default() -> None:
    assert ProcessLimits().memory() >= 1 << 30
    assert ProcessLimits(memory_bytes=5).memory() == 5


def test_nothing_is_taken_while_the_server_ends(runs: Runs) -> None:
    runs.stop()
    with pytest.raises(Unavailable, match="shutting down"):
        runs.start("late")
    (record,) = runs.directory.records("late")
    assert record.state == "interrupted"
