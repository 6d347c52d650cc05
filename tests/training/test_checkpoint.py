from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import Parameter

from app.errors import Conflict, CorruptData, StoreFull
from app.training.checkpoint import Checkpoint, has_checkpoint, load_checkpoint, save_checkpoint
from app.training.optimizers import make_optimizer
from app.training.run import DevRecord, History, StepRecord
from app.training.settings import TrainingSettings

IDENTITY = {"learning_rate": "0.1", "training data": "abc"}


def _checkpoint(step: int = 1, optimizer: str = "adamw") -> Checkpoint:
    settings = TrainingSettings.model_validate({"optimizer": optimizer, "weight_decay": 0.1})
    parameter = Parameter(torch.linspace(-1, 1, 12).view(3, 4) * step)
    made = make_optimizer(settings, [parameter])
    parameter.grad = torch.ones(3, 4) / 3
    made.step()
    record = StepRecord(
        step=step, loss=1 / 3, learning_rate=0.1, grad_norm=1e-40, num_tokens=2**40, seconds=0.1
    )
    look = DevRecord(step=step, loss=0.1, scores={"exact": 2 / 3}, is_best=True, seconds=3.3)
    return Checkpoint(
        step=step,
        learned={"rows": parameter.detach()},
        optimizer=made.state_dict(),
        history=History((record,) * step, (look,), ("line",)),
        best=(b"one task's", b"\x00 another's"),
        is_over=False,
    )


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_what_is_loaded_is_what_was_saved(tmp_path: Path, optimizer: str) -> None:
    assert load_checkpoint(tmp_path, IDENTITY) is None
    saved = _checkpoint(2, optimizer)
    save_checkpoint(tmp_path / "new", IDENTITY, saved)
    loaded = load_checkpoint(tmp_path / "new", IDENTITY)
    assert loaded is not None
    assert (loaded.step, loaded.history, loaded.best, loaded.is_over) == (2, saved.history, saved.best, False)
    assert torch.equal(loaded.learned["rows"], saved.learned["rows"])
    for name, value in saved.optimizer["state"][0].items():
        assert torch.equal(torch.as_tensor(loaded.optimizer["state"][0][name]), torch.as_tensor(value)), name
    assert loaded.optimizer["param_groups"] == saved.optimizer["param_groups"]


def _torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _foreign(path: Path) -> None:
    torch.save({"step": 3}, path)


def _missing(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [_torn, _flipped, _empty, _foreign, _missing])
def test_the_one_before_is_used_where_the_newest_is_not_whole(tmp_path: Path, damage: object) -> None:
    assert callable(damage)
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, IDENTITY, _checkpoint(step))
    damage(tmp_path / "checkpoint")
    loaded = load_checkpoint(tmp_path, IDENTITY)
    assert loaded is not None
    assert loaded.step == 2


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_torn, "is damaged"),
        (_flipped, "is damaged"),
        (_foreign, "is no checkpoint"),
        (_empty, "is no checkpoint"),
    ],
)
def test_a_lone_damaged_or_foreign_checkpoint_is_refused_with_a_reason(
    tmp_path: Path, damage: object, reason: str
) -> None:
    assert callable(damage)
    save_checkpoint(tmp_path, IDENTITY, _checkpoint())
    damage(tmp_path / "checkpoint")
    with pytest.raises(CorruptData, match=reason) as refused:
        load_checkpoint(tmp_path, IDENTITY)
    assert "delete it" in refused.value.message


def test_another_run_s_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, IDENTITY, _checkpoint())
    with pytest.raises(Conflict) as refused:
        load_checkpoint(tmp_path, IDENTITY | {"learning_rate": "0.3", "origin": "task 4"})
    assert (
        "learning_rate was 0.1 and is now 0.3; origin was not given and is now task 4"
        in refused.value.message
    )
    assert "data" not in refused.value.message.split("(")[1].split(")")[0]


def test_a_checkpoint_that_can_t_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, IDENTITY, _checkpoint(1))
    (tmp_path / ".checkpoint.tmp").symlink_to("/dev/full")
    with pytest.raises(StoreFull, match="checkpoint of the training run"):
        save_checkpoint(tmp_path, IDENTITY, replace(_checkpoint(2), is_over=True))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}
    loaded = load_checkpoint(tmp_path, IDENTITY)
    assert loaded is not None
    assert loaded.step == 1


def test_a_checkpoint_between_two_renames_is_one_to_go_on_from(tmp_path: Path) -> None:
    assert not has_checkpoint(tmp_path)
    save_checkpoint(tmp_path, IDENTITY, _checkpoint(1))
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.before")
    assert has_checkpoint(tmp_path)
