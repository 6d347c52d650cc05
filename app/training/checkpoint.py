"""What a run needs to go on after it was killed, in one file that is replaced atomically.

A file is one line (format, sha256 of the rest), then tensors and records as `torch.save` writes them; it is
read without unpickling objects. The file before it is kept, in case the disk damages the newer one.
"""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.errors import Conflict, CorruptData
from app.training.atomic_file import replace_file, writing
from app.training.run import DevRecord, History, StepRecord

Identity = Mapping[str, str]  # what a run is of: each setting, the data, the base

_CURRENT, _BEFORE = "checkpoint", "checkpoint.before"
_FORMAT = b"promptplex.checkpoint.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A run after a step. Batches, learning rate and random numbers are functions of seed and step."""

    step: int
    learned: dict[str, Tensor]  # state of the modules that write the prompt
    optimizer: dict[str, Any]
    history: History
    best: tuple[bytes, ...]  # canonical file of each task's best prompt
    is_over: bool  # no step will follow


def save_checkpoint(directory: Path, identity: Identity, checkpoint: Checkpoint) -> None:
    """Replace the run's checkpoint; the one before it is kept. Raise StoreFull."""
    content = io.BytesIO()
    torch.save({"identity": dict(identity)} | _plain(checkpoint), content)
    data = content.getbuffer()
    head = b"%s %s\n" % (_FORMAT, hashlib.sha256(data).hexdigest().encode())
    with writing(_CURRENT):
        directory.mkdir(parents=True, exist_ok=True)
    replace_file(directory / _CURRENT, head + data, before=directory / _BEFORE)


def has_checkpoint(directory: Path) -> bool:
    """Return whether there is one, whole or damaged; after a kill it may be the one before alone."""
    return any((directory / name).exists() for name in (_CURRENT, _BEFORE))


def load_checkpoint(directory: Path, identity: Identity) -> Checkpoint | None:
    """Return the newest checkpoint that is whole, to go on from; None: there is none.

    Raise CorruptData: no file of these is whole. Raise Conflict: it is of another run.
    """
    damage = ""
    for path in (directory / _CURRENT, directory / _BEFORE):
        try:
            saved = _read(path)
        except FileNotFoundError:
            continue
        except CorruptData as error:
            damage = damage or error.message
            continue
        _check_identity(saved.pop("identity"), identity)
        return _checkpoint(saved)
    if damage:
        raise CorruptData(f"{damage}; delete it to train from the start")
    return None


def _read(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        head, data = file.readline(256).split(), file.read()
    if head[:1] != [_FORMAT]:
        raise CorruptData(f"the file '{path.name}' is no checkpoint of this version of promptplex train")
    if head[1:] != [hashlib.sha256(data).hexdigest().encode()]:
        raise CorruptData(f"the file '{path.name}' is damaged: its bytes don't hash to what was written")
    saved: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return saved


def _check_identity(saved: Identity, ours: Identity) -> None:
    """Raise Conflict with the names of what differs."""
    names = [name for name in {**saved, **ours} if saved.get(name) != ours.get(name)]
    if names:
        differences = "; ".join(
            f"{name} was {saved.get(name, 'not given')} and is now {ours.get(name, 'not given')}"
            for name in names
        )
        raise Conflict(
            f"the checkpoint is of another run ({differences}); repeat that run's settings and data to "
            "resume it, or train into another directory"
        )


def _plain(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return tensors, texts and numbers only, which are read without unpickling objects."""
    history = checkpoint.history
    return {
        "step": checkpoint.step,
        "learned": checkpoint.learned,
        "optimizer": checkpoint.optimizer,
        "steps": [asdict(record) for record in history.steps],
        "looks": [asdict(record) for record in history.looks],
        "advice": list(history.advice),
        "best": [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in checkpoint.best],
        "is_over": checkpoint.is_over,
    }


def _checkpoint(saved: dict[str, Any]) -> Checkpoint:
    history = History(
        tuple(StepRecord(**record) for record in saved.pop("steps")),
        tuple(DevRecord(**record) for record in saved.pop("looks")),
        tuple(saved.pop("advice")),
    )
    best = tuple(data.numpy().tobytes() for data in saved.pop("best"))
    return Checkpoint(**saved, history=history, best=best)
