from pathlib import Path
from typing import Any

import pytest

from app.errors import InvalidRequest
from app.training.examples import EncodedExample
from app.training.loop import Trainer
from app.training.settings import Init, Method, TrainingSettings
from app.training.sweep import SweepResult, grid, run_sweep
from tests.training.bases import causal_base, examples
from tests.training.runs import SETTINGS, Heard, dev_set, timeless, trainer


def test_a_grid_is_every_combination_in_the_order_it_is_written() -> None:
    settings = TrainingSettings(method=Method.PROMPT, steps=7)
    found = grid(settings, "lr=1e-3,0.5 length=5,16 init=text,vocabulary")
    assert [changes for _, changes in found[:3]] == [
        {"learning_rate": "1e-3", "num_virtual_tokens": "5", "init": "text"},
        {"learning_rate": "1e-3", "num_virtual_tokens": "5", "init": "vocabulary"},
        {"learning_rate": "1e-3", "num_virtual_tokens": "16", "init": "text"},
    ]
    assert len(found) == 8
    expected = settings.model_copy(
        update={"learning_rate": 0.5, "num_virtual_tokens": 16, "init": Init.VOCABULARY}
    )
    assert found[-1][0] == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "such as: lr=1e-3"),
        ("lr", "takes NAME=VALUE"),
        ("lr=", "takes NAME=VALUE"),
        ("speed=3", "with one of lr, length"),
        ("lr=0.1 learning-rate=0.2", "each setting once"),
        ("lr=fast", "learning_rate fast: Input should be a valid number"),
        ("lr=0.1,11", "learning_rate 11: Input should be less than or equal to 10"),
        ("length=2.5", "num_virtual_tokens 2.5"),
        ("method=lora", "method lora"),
        ("seed=" + ",".join(map(str, range(65))), "gives 65 candidates; 64 are allowed"),
    ],
)
def test_a_grid_that_means_nothing_is_refused(text: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as refused:
        grid(TrainingSettings(), text)
    assert "\n" not in refused.value.message


RATES = ("1e-6", "0.1", "0.03", "1e-3", "1e-5")
_SETTINGS: dict[str, Any] = {"steps": 16, "eval_every": 2}


def _data() -> dict[str, Any]:
    """One answer to everything, which is learned the sooner, the higher the rate."""
    base = causal_base("llama")

    def answered(count: int, seed: int) -> list[EncodedExample]:
        return [EncodedExample(each.source, (7, 9, 11, 1)) for each in examples(base, count, seed)]

    return {"train": answered(20, 0), "dev": dev_set(base, answered(8, 1)), "answerer": None}


class _Sweep:
    """A sweep that is killed when it makes a trainer for the nth time."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._heard: list[Heard] = []

    @property
    def num_steps(self) -> int:
        return sum(len(heard.steps) for heard in self._heard)

    def run(self, kill_at: int = 1000) -> SweepResult:
        settings = TrainingSettings.model_validate(SETTINGS | _SETTINGS)

        def made(number: int, given: TrainingSettings) -> Trainer:
            if len(self._heard) == kill_at:
                raise KeyboardInterrupt
            self._heard.append(Heard())
            changes = _SETTINGS | given.model_dump(include={"learning_rate"})
            directory = self._root / str(number)
            return trainer(settings=changes, checkpoint_dir=directory, listener=self._heard[-1], **_data())

        return run_sweep(grid(settings, f"lr={','.join(RATES)}"), made)


def test_the_better_half_goes_on_and_the_winner_is_the_run_without_a_sweep(tmp_path: Path) -> None:
    sweep = _Sweep(tmp_path)
    swept = sweep.run()
    assert [trial.step for trial in swept.trials] == [2] * 5 + [4] * 3 + [8] * 2 + [16]
    assert [trial.changes["learning_rate"] for trial in swept.trials[5:]] == [
        "0.1", "0.03", "1e-3", "0.1", "0.03", "0.1",
    ]  # fmt: skip
    assert sweep.num_steps == 5 * 2 + 3 * 2 + 2 * 4 + 8, "what was trained once isn't trained again"
    alone = trainer(settings=_SETTINGS | {"learning_rate": 0.1}, **_data())
    assert timeless(alone.run()) == timeless(swept.result)
    assert swept.settings == alone.settings


def test_a_sweep_that_was_killed_goes_on(tmp_path: Path) -> None:
    def trials(result: SweepResult) -> list[Any]:
        return [(each.changes, each.step, each.look.loss) for each in result.trials]

    whole = _Sweep(tmp_path / "whole").run()
    for kill_at in (0, 3, 6, 9):
        with pytest.raises(KeyboardInterrupt):
            _Sweep(tmp_path / "killed").run(kill_at)
    resumed = _Sweep(tmp_path / "killed").run()
    assert trials(resumed) == trials(whole)
    assert timeless(resumed.result) == timeless(whole.result)
    again = _Sweep(tmp_path / "killed")
    assert trials(again.run()) == trials(whole)
    assert again.num_steps == 0
