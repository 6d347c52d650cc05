"""Runs that are killed: a script, so that its children are forked from a process without threads.

    python -m tests.training.killed_runs ROOT METHOD KILLS FILE_KILLS SEED

KILLS strike at random moments; of the operations on files (opening, renaming) that a run makes, FILE_KILLS
are struck just before. Whatever was killed is resumed until it ends by itself, and must then be what the
unbroken run is: tensors, prompt, records, files.
"""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from app.training.checkpoint import load_checkpoint
from app.training.run import History
from app.training.run_directory import RunDirectory, RunState, RunStatus, held, read_run
from tests.training.runs import trainer

METHODS: dict[str, dict[str, Any]] = {
    "prompt": {},
    "adafactor": {"optimizer": "adafactor"},
    "p-tuning": {"method": "p-tuning", "init": "random", "network": "lstm", "accumulation": 2},
    "prefix": {"method": "prefix"},
}
_OPERATIONS = 150  # on files, that a run makes at least, with a checkpoint after each step
_STATUS = RunStatus(task="t", settings={}, data_digest="d", base="tiny", base_fingerprint="f")


def train(path: Path, method: str, checkpoint_seconds: float) -> None:
    """What `promptplex train` does, to the end."""
    with held(path):
        directory = RunDirectory(path, _STATUS)
        made = trainer(
            settings=METHODS[method] | {"steps": 24},
            listener=directory,
            checkpoint_dir=path,
            checkpoint_seconds=checkpoint_seconds,
        )
        result = made.run()
        directory.write("prompt.safetensors", result.prompt.data)
        directory.end(RunState.DONE)


def forked(work: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def ended(child: int) -> bool:
    """Wait for a child. True: it ended by itself, and well; False: it was killed."""
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status == 0


def killed_at_random(work: Callable[[], None], seconds: float) -> bool:
    """Return whether the kill came too late."""
    child = forked(work)
    time.sleep(random.uniform(0, seconds))
    os.kill(child, signal.SIGKILL)
    return ended(child)


def killing(path: Path, number: int, work: Callable[[], None]) -> None:
    """Kill this process just before it opens or renames a file of the run for the nth time."""
    left = number

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in ("open", "os.rename") and str(arguments[0]).startswith(str(path)):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    work()


def state(path: Path) -> tuple[History, bytes, dict[str, Any]]:
    """Everything that a run leaves but for what a clock measured."""
    view = read_run(path)
    assert view.status.state is RunState.DONE
    assert not [each for each in path.iterdir() if each.name.startswith(".")]
    history = History(
        tuple(map(partial(replace, seconds=0.0), view.history.steps)),
        tuple(map(partial(replace, seconds=0.0), view.history.looks)),
        view.history.advice,
    )
    return history, (path / "prompt.safetensors").read_bytes(), _tensors(path)


def _tensors(path: Path) -> dict[str, Any]:
    method = path.name.split("-", 1)[1]
    identity = trainer(settings=METHODS[method] | {"steps": 24})._identity()
    saved = load_checkpoint(path, identity)
    assert saved is not None
    states = saved.optimizer["state"].items()
    return saved.learned | {f"{key}.{name}": value for key, each in states for name, value in each.items()}


def check(path: Path, expected: tuple[History, bytes, dict[str, Any]]) -> None:
    history, prompt, tensors = state(path)
    assert history == expected[0]
    assert prompt == expected[1]
    assert tensors.keys() == expected[2].keys()
    for name, tensor in tensors.items():
        assert torch.equal(torch.as_tensor(tensor), torch.as_tensor(expected[2][name])), name


def main(root: Path, method: str, kills: int, file_kills: int, seed: int) -> None:
    random.seed(seed)
    whole = root / f"whole-{method}"
    began = time.monotonic()
    assert ended(forked(partial(train, whole, method, 30.0)))
    seconds = time.monotonic() - began
    expected = state(whole)
    runs = at_steps = 0
    while kills > 0:
        path, runs = root / f"{runs}-{method}", runs + 1
        work = partial(train, path, method, random.choice((0.0, 0.1)))
        while kills > 0 and not killed_at_random(work, seconds / 3):
            kills -= 1
            at_steps += 0 < _steps(path) < 24
        assert ended(forked(work))
        check(path, expected)
    for number in random.sample(range(_OPERATIONS), file_kills):
        path = root / f"file{number}-{method}"
        work = partial(train, path, method, 0.0)
        assert not ended(forked(partial(killing, path, number, work))), (
            "a run makes more operations than that"
        )
        assert ended(forked(work))
        check(path, expected)
    sys.stdout.write(f"{runs} runs, {at_steps} kills between the first step and the last\n")


def _steps(path: Path) -> int:
    return len(read_run(path).history.steps) if (path / "run.json").exists() else 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
