"""Uploads from a disk, for `push`, `validate` and the import folder: a prompt, its config, a task file."""

import errno
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.serving.publishing.upload import Upload
from app.store.blobs import MAX_BLOB_BYTES
from app.store.bounded import read_bounded
from app.store.source_files import CONFIG, PROMPT
from app.strict_json import JsonError, parse_json

PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
TASK_FILE = "task.json"
MAX_JSON_BYTES = 1 << 20  # of a configuration or a task file
_PICKLES = (".bin", ".pt", ".pth", ".pkl")
_NO_PICKLES = (
    "a pickle can run code when read, so it isn't accepted; save it again with save_pretrained of a "
    "current PEFT, which writes .safetensors, or make a canonical file of it with `promptplex convert`"
)
_CHECKPOINT = re.compile(r"checkpoint-([0-9]{1,18})")
_WHOLE_MODEL = "model*.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle(Upload):
    """An upload from a disk."""

    name: str  # the directory's or file's own name: the task id where none is given


def read_bundle(path: Path, *, template: str | None = None) -> Bundle:
    """Read a PEFT directory, a directory with one .safetensors file, or such a file alone.

    Raise ValueError when there is nothing to push, FileNotFoundError when there is no such path.
    """
    weights = _find_weights(path)
    task = _read_task(path / TASK_FILE) if path.is_dir() else {}
    if template is not None:
        task["template"] = template
    if weights is None and not (task and _is_text_only(path)):
        raise ValueError(_nothing_found(path))
    files = {} if weights is None else _read_files(path, weights)
    return Bundle(name=_task_name(path), files=files, task=task or None)


def text_bundle(template: str | None) -> Bundle:
    """Return a task without anything learned: a template alone."""
    return Bundle(name="", files={}, task={} if template is None else {"template": template})


def _find_weights(path: Path) -> Path | None:
    if not path.exists():
        raise FileNotFoundError(2, "no such file or directory", str(path))
    if path.suffix in _PICKLES and path.is_file():
        raise ValueError(f"{path}: {_NO_PICKLES}")
    if path.is_file():
        return path
    if (path / PEFT_WEIGHTS).is_file():
        return path / PEFT_WEIGHTS
    if (path / "config.json").is_file() and any(path.glob(_WHOLE_MODEL)):
        raise ValueError(
            f"{path} holds a whole model, not a prompt: push what PEFT's save_pretrained wrote "
            f"({PEFT_WEIGHTS} with {PEFT_CONFIG}), or serve it with `promptplex serve --model {path}`"
        )
    found = sorted(path.glob("*.safetensors"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ValueError(f"{path} holds several .safetensors files ({names}): name the one to push")
    return found[0] if found else None


def _read_files(path: Path, weights: Path) -> dict[str, bytes]:
    """Return the weights, and the config beside them unless a file of another name was given alone."""
    files = {PROMPT: _read(weights, MAX_BLOB_BYTES)}
    config = weights.with_name(PEFT_CONFIG)
    if (path.is_dir() or weights.name == PEFT_WEIGHTS) and config.is_file():
        files[CONFIG] = _read(config, MAX_JSON_BYTES)
    return files


def _read(path: Path, limit: int) -> bytes:
    try:
        return read_bounded(path, limit)
    except OSError as error:
        if error.errno in (errno.EFBIG, errno.EINVAL):  # it stays so, however often it is tried
            raise ValueError(f"{path} can't be read: {error.strerror}") from None
        raise


def _is_text_only(path: Path) -> bool:
    """Return whether there is a task file, and no sign that a prompt belongs beside it."""
    config = (path / PEFT_CONFIG).exists()
    return (path / TASK_FILE).is_file() and not (config or _pickles_in(path) or _adapters_inside(path))


def _pickles_in(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES)


def _nothing_found(path: Path) -> str:
    pickles = _pickles_in(path)
    if pickles:
        return f"{path} holds {', '.join(pickles)}: {_NO_PICKLES}"
    inside = _adapters_inside(path)
    if inside:
        shown = ", ".join(str(found.relative_to(path)) for found in inside[-8:])
        return f"{path} holds no prompt itself but in {shown}; push one of them, such as {inside[-1]}"
    return (
        f"{path} holds no prompt: expected {PEFT_WEIGHTS} with {PEFT_CONFIG} (what PEFT's save_pretrained "
        f"writes), another .safetensors file, or a {TASK_FILE} for a text-only task"
    )


def _adapters_inside(path: Path) -> list[Path]:
    """Return directories in it that hold an adapter, such as a trainer's checkpoints, the latest last."""
    found = {file.parent for depth in ("*", "*/*") for file in path.glob(f"{depth}/{PEFT_CONFIG}")}
    return sorted(found, key=lambda each: [_by_number(part) for part in each.relative_to(path).parts])


def _by_number(name: str) -> tuple[str, int]:
    """Return a sort key that puts `checkpoint-1000` after `checkpoint-500`."""
    match = _CHECKPOINT.fullmatch(name)
    return ("checkpoint", int(match[1])) if match else (name, 0)


def _read_task(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        task = parse_json(_read(path, MAX_JSON_BYTES))
    except JsonError as error:
        raise ValueError(f"{path} is refused: {error}") from None
    if not isinstance(task, dict):
        raise ValueError(f'{path} must hold a JSON object, such as {{"template": "Review: {{text}}"}}')
    return task


def _task_name(path: Path) -> str:
    resolved = path.resolve()
    name = resolved.name if resolved.is_dir() else resolved.stem
    if name == PEFT_WEIGHTS.removesuffix(".safetensors"):
        resolved = resolved.parent
        name = resolved.name
    if _CHECKPOINT.fullmatch(name):
        name = resolved.parent.name
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("._-")
