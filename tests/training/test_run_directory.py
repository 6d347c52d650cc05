import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.errors import Conflict, CorruptData, NotFound, StoreFull
from app.training.run import DevRecord, History, StepRecord
from app.training.run_directory import RunDirectory, RunState, RunStatus, held, read_run

STATUS = RunStatus(task="mood", settings={"steps": 3}, data_digest="d", base="b", base_fingerprint="f")


def _step(number: int) -> StepRecord:
    return StepRecord(
        step=number, loss=1 / number, learning_rate=0.1, grad_norm=2.0, num_tokens=7, seconds=0.5
    )


def _look(number: int, *, is_best: bool = True) -> DevRecord:
    return DevRecord(step=number, loss=1 / 3, scores={"exact": 0.25}, is_best=is_best, seconds=1.0)


def test_what_is_reported_can_be_read_at_any_moment(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    run = RunDirectory(tmp_path / "run", STATUS)
    assert read_run(tmp_path / "run").status.state is RunState.PREPARING
    run.on_start(History())
    assert read_run(tmp_path / "run").history == History()
    run.on_dev(_look(0))
    for number in (1, 2):
        run.on_step(_step(number))
        assert read_run(tmp_path / "run").history.steps[-1] == _step(number)
    run.on_dev(_look(2, is_best=False))
    run.on_advice("go on")
    view = read_run(tmp_path / "run")
    assert view.history == History((_step(1), _step(2)), (_look(0), _look(2, is_best=False)), ("go on",))
    assert (view.status.state, view.status.best_step) == (RunState.TRAINING, 0)
    assert view.status.best_scores == {"exact": 0.25}
    run.write("metrics.json", b"{}")
    run.end(RunState.FAILED, "no more room")
    view = read_run(tmp_path / "run")
    assert (view.status.state, view.status.error) == (RunState.FAILED, "no more room")
    assert (tmp_path / "run" / "metrics.json").read_bytes() == b"{}"
    assert not [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]


def test_a_resumed_run_holds_each_record_once(tmp_path: Path) -> None:
    """A process is killed after records that its checkpoint doesn't know, within a line."""
    run = RunDirectory(tmp_path, STATUS)
    run.on_start(History())
    run.on_dev(_look(0))
    for number in range(1, 6):
        run.on_step(_step(number))
    run.on_advice("lost with the process")
    with open(tmp_path / "steps.jsonl", "ab") as file:
        file.write(b'{"step": 6, "lo')
    assert [record.step for record in read_run(tmp_path).history.steps] == [1, 2, 3, 4, 5]
    run = RunDirectory(tmp_path, STATUS)
    run.on_start(History((_step(1), _step(2), _step(3)), (_look(0),)))
    run.on_step(_step(4))
    run.end(RunState.DONE)
    view = read_run(tmp_path)
    assert [record.step for record in view.history.steps] == [1, 2, 3, 4]
    assert view.history.advice == ()
    lines = (tmp_path / "steps.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_two_processes_can_t_train_into_one_directory(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from app.training.run_directory import *\n"
        "try:\n with held(Path(sys.argv[1])): print('held')\n"
        "except Conflict as error: print(error.message)"
    )

    def said() -> str:
        command = [sys.executable, "-c", code, str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with held(tmp_path):
        assert "another process trains" in said()
        with pytest.raises(Conflict), held(tmp_path):
            pass
    assert said() == "held\n"


def test_no_run_and_a_damaged_one_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no training run"):
        read_run(tmp_path / "nothing")
    (tmp_path / "run.json").write_text('{"state": "done"}')
    with pytest.raises(CorruptData, match="can't be read"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(CorruptData, match="can't be read"):
        read_run(tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_said_in_one_line(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, STATUS)
    run.on_start(History())
    (tmp_path / "steps.jsonl").unlink()
    (tmp_path / "steps.jsonl").symlink_to("/dev/full")
    with pytest.raises(StoreFull, match=r"steps\.jsonl of the training run"):
        run.on_step(_step(1))
